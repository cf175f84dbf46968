package controllers

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
)

// NewSecrets returns the Secrets of a cluster. The reader must not cache (manager.GetAPIReader): a cache would list and hold all of
// them, and we may only get those that we can name.
func NewSecrets(reader client.Reader) registry.Secrets { return secrets{reader} }

type secrets struct{ reader client.Reader }

func (s secrets) Get(ctx context.Context, namespace, name string) (map[string][]byte, error) {
	var secret corev1.Secret
	err := s.reader.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &secret)
	if apierrors.IsNotFound(err) {
		err = registry.ErrSecretNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("get secret %s/%s: %w", namespace, name, err)
	}
	return secret.Data, nil
}

var (
	errNotDeclared     = errors.New("spec.database is not set: the controller of this region needs the connection string; name its Secret in spec.database.secretRef")
	errBadCertificates = errors.New("the certificates do not fit")
)

// optionalError is a fault of the credentials of something without which the Deployment works: its search store or its cache.
type optionalError struct{ error }

func (e optionalError) Unwrap() error { return e.error }

// checkCredentials returns nil when the secrets of a Deployment exist, have their keys, and its certificate is its own and in date. An error
// names the field that refers to the secret. Whether the database accepts the connection string is seen by who connects.
func checkCredentials(ctx context.Context, s registry.Secrets, d registry.Deployment, now time.Time) error {
	if d.Database.Name == "" {
		return errNotDeclared
	}
	if err := checkConnection(ctx, s, "spec.database.secretRef", d.Database); err != nil {
		return err
	}
	if d.TLS.Name != "" {
		identity, err := s.Get(ctx, d.TLS.Namespace, d.TLS.Name)
		if err != nil {
			return fmt.Errorf("spec.tls.secretRef: %w", err)
		}
		if err := checkIdentity(identity, d, now); err != nil {
			return fmt.Errorf("spec.tls.secretRef: secret %s: %w: %w", d.TLS.Name, errBadCertificates, err)
		}
	}
	if err := checkConnection(ctx, s, "spec.search.secretRef", d.Search); err != nil {
		return optionalError{err}
	}
	if err := checkConnection(ctx, s, "spec.cache.secretRef", d.Cache); err != nil {
		return optionalError{err}
	}
	return nil
}

// checkConnection returns nil when the entry that a field refers to is there, or the field refers to none.
func checkConnection(ctx context.Context, s registry.Secrets, field string, ref registry.SecretRef) error {
	if ref.Name == "" {
		return nil
	}
	secret, err := s.Get(ctx, ref.Namespace, ref.Name)
	if err != nil {
		return fmt.Errorf("%s: %w", field, err)
	}
	if len(secret[ref.Key]) == 0 {
		return fmt.Errorf("%s: key %q of secret %s: %w", field, ref.Key, ref.Name, registry.ErrSecretNotFound)
	}
	return nil
}

func checkIdentity(secret map[string][]byte, d registry.Deployment, now time.Time) error {
	material, err := pki.Parse(secret[v1alpha1.TLSCertKey], secret[v1alpha1.TLSKeyKey], secret[v1alpha1.TLSCAKey])
	if err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(material.Certificate.Certificate[0])
	if err != nil {
		return err
	}
	if now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		return fmt.Errorf("the certificate is valid from %s to %s", leaf.NotBefore.Format(time.RFC3339), leaf.NotAfter.Format(time.RFC3339))
	}
	got, err := pki.FromCertificate(leaf)
	if err != nil {
		return err
	}
	if want := (pki.Identity{TrustDomain: d.TrustDomain, Service: d.Service, Region: d.Region}); got != want {
		return fmt.Errorf("the certificate is that of %s, but this Deployment is %s", got, want)
	}
	return nil
}
