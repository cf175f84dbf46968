// Package pki says who a connection speaks for.
//
// An identity is the only URI SAN of a certificate: spiffe://<trust domain>/service/<service>/region/<region> for a Deployment,
// spiffe://<trust domain>/user/<name> for a user. Host names and common names prove nothing here: a client accepts a server because its
// certificate names the expected service and region, wherever it was dialed.
//
// Certificates come from a Source, which is asked at every handshake, so that renewed files serve without a restart. The CA of this
// package is for the demo, tests and development; in production any CA that issues such URI SANs does.
package pki

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"sync"
)

// Material is what one side of a connection needs: its own certificate and the CAs it trusts.
type Material struct {
	Certificate tls.Certificate
	Roots       *x509.CertPool
}

// Source returns the material to use now. It is called at every handshake, concurrently.
type Source func() (*Material, error)

// Parse reads PEM: a certificate chain, its key, and one or more CA certificates (two while a CA is being replaced).
func Parse(certPEM, keyPEM, caPEM []byte) (*Material, error) {
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("read certificate and key: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(caPEM) {
		return nil, errors.New("read CA certificates: no certificate in the PEM")
	}
	return &Material{Certificate: pair, Roots: roots}, nil
}

// Static returns a Source of unchanging PEM.
func Static(pair KeyPair, caPEM []byte) (Source, error) {
	m, err := Parse(pair.CertPEM, pair.KeyPEM, caPEM)
	if err != nil {
		return nil, err
	}
	return func() (*Material, error) { return m, nil }, nil
}

// Files returns a Source that follows three PEM files. While they cannot be read or do not fit together (a renewal is half
// written), the last good material serves and onError, unless nil, is told at every handshake.
func Files(certFile, keyFile, caFile string, onError func(error)) (Source, error) {
	f := &files{paths: [3]string{certFile, keyFile, caFile}}
	if err := f.load(); err != nil {
		return nil, err
	}
	return func() (*Material, error) {
		f.mu.Lock()
		defer f.mu.Unlock()
		if err := f.load(); err != nil && onError != nil {
			onError(err)
		}
		return f.material, nil
	}, nil
}

type files struct {
	paths [3]string

	mu       sync.Mutex
	content  [3][]byte
	material *Material
}

// load compares the content, not the modification times: three small reads per handshake cost less than a missed renewal.
func (f *files) load() error {
	var content [3][]byte
	changed := f.material == nil
	for i, path := range f.paths {
		b, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("read TLS file: %w", err)
		}
		content[i] = b
		changed = changed || !bytes.Equal(b, f.content[i])
	}
	if !changed {
		return nil
	}
	m, err := Parse(content[0], content[1], content[2])
	if err != nil {
		return fmt.Errorf("load %s, %s and %s: %w", f.paths[0], f.paths[1], f.paths[2], err)
	}
	f.content, f.material = content, m
	return nil
}

// ServerTLS returns the TLS side of a server: TLS 1.3 only, and only for clients whose certificate carries an identity of trustDomain.
// Who may call what is the server's own decision; see FromCertificate.
func ServerTLS(source Source, trustDomain string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2", "http/1.1"},
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			m, err := source()
			if err != nil {
				return nil, err
			}
			return &tls.Config{
				MinVersion:   tls.VersionTLS13,
				NextProtos:   []string{"h2", "http/1.1"},
				Certificates: []tls.Certificate{m.Certificate},
				ClientAuth:   tls.RequireAndVerifyClientCert,
				ClientCAs:    m.Roots,
				// A resumed session would skip the chain, and with it a CA that was withdrawn since.
				SessionTicketsDisabled: true,
				VerifyConnection: func(cs tls.ConnectionState) error {
					id, err := FromCertificate(cs.PeerCertificates[0])
					if err != nil {
						return identityError{err}
					}
					if id.TrustDomain != trustDomain {
						return identityError{fmt.Errorf("caller %s is not of trust domain %s", id, trustDomain)}
					}
					return nil
				},
			}, nil
		},
	}
}

// ClientTLS returns the TLS side of a client that talks to exactly one Deployment: the server's chain must lead to the
// source's CAs and its identity must be want, whatever the host name.
func ClientTLS(source Source, want Identity) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			m, err := source()
			if err != nil {
				return nil, err
			}
			return &m.Certificate, nil
		},
		// Not insecure: VerifyConnection checks the chain and then the identity. The built-in check would ask for a host name instead.
		InsecureSkipVerify: true, //nolint:gosec // G402: replaced by VerifyConnection
		VerifyConnection: func(cs tls.ConnectionState) error {
			m, err := source()
			if err != nil {
				return err
			}
			intermediates := x509.NewCertPool()
			for _, cert := range cs.PeerCertificates[1:] {
				intermediates.AddCert(cert)
			}
			_, err = cs.PeerCertificates[0].Verify(x509.VerifyOptions{
				Roots:         m.Roots,
				Intermediates: intermediates,
				KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
			})
			if err != nil {
				return fmt.Errorf("verify certificate of %s: %w", want, err)
			}
			id, err := FromCertificate(cs.PeerCertificates[0])
			if err != nil {
				return err
			}
			if id != want {
				return fmt.Errorf("server is %s: want %s", id, want)
			}
			return nil
		},
	}
}
