package registry

import (
	"cmp"
	"fmt"
	"net/url"
	"slices"
	"time"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

// Key names a Deployment: one service in one region.
type Key struct {
	Service string
	Region  string
}

// String returns "service/region".
func (k Key) String() string { return k.Service + "/" + k.Region }

// Compare orders keys by service, then by region.
func (k Key) Compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Service, o.Service), cmp.Compare(k.Region, o.Region))
}

// SecretRef says where a secret is, never what it is.
type SecretRef struct {
	Namespace string
	// Name is empty when there is no secret.
	Name string
	// Key is the entry of the secret; empty when the whole secret is meant.
	Key string
}

// SuspendScope is a part of the copying into a Deployment.
type SuspendScope struct {
	PeerRegion string
}

// Deployment is one service in one region as the topology declares it. It is a value: nobody changes one that others can see.
type Deployment struct {
	Key
	// Namespace and Name are those of the object that declares the Deployment.
	Namespace, Name string
	// Endpoint is the base URL of the Deployment's API server.
	Endpoint string
	// Version is the API version that the Deployment should serve, for example "v1".
	Version string
	// Ring is the number of shards of the service's names.
	Ring int
	// Disabled says that nobody may route to the Deployment.
	Disabled bool
	// Suspended stops all of the Deployment's copying, SuspendScopes only what they name.
	Suspended     bool
	SuspendScopes []SuspendScope
	// TrustDomain is the authority in the identities (spiffe://<trust domain>/...) of the Deployment and its peers.
	TrustDomain string
	// TLS is the secret with tls.crt, tls.key and ca.crt; without a name the Deployment has no TLS material.
	TLS SecretRef
	// Database is the secret entry with the connection string; only the Deployment's own region needs it.
	Database SecretRef
	// Cache is the secret entry with the URL of the cache's Redis, without a name there is none; CacheLists are the types whose pages of List are cached.
	Cache      SecretRef
	CacheLists []string
	// Search is the secret entry with the connection string of the search store, SearchType what that is; without a name there is none.
	Search     SecretRef
	SearchType v1alpha1.SearchStoreType
	// LagObjective is the freshness that the read copies should have; 0 when none is declared.
	LagObjective time.Duration
}

// String describes the Deployment for people and logs. It shows no credentials, not even those that someone put into the endpoint.
func (d Deployment) String() string {
	endpoint := "invalid endpoint"
	if u, err := url.Parse(d.Endpoint); err == nil {
		endpoint = u.Redacted()
	}
	return fmt.Sprintf("%s (%s at %s)", d.Key, d.Version, endpoint)
}

// Suspends reports whether copying from a peer region is suspended.
func (d Deployment) Suspends(peerRegion string) bool {
	return d.Suspended || slices.Contains(d.SuspendScopes, SuspendScope{PeerRegion: peerRegion})
}

// DeploymentOf returns what an object declares, with the defaults that the object leaves out.
func DeploymentOf(o *v1alpha1.Deployment) Deployment {
	d := Deployment{
		Key:         Key{Service: o.Spec.Service, Region: o.Spec.Region},
		Namespace:   o.Namespace,
		Name:        o.Name,
		Endpoint:    o.Spec.Endpoint,
		Version:     o.Spec.Version,
		Ring:        int(cmp.Or(o.Spec.Shards, v1alpha1.DefaultShards)),
		Disabled:    o.Spec.Disabled,
		Suspended:   o.Spec.Suspend,
		TrustDomain: v1alpha1.DefaultTrustDomain,
	}
	for _, s := range o.Spec.SuspendScopes {
		d.SuspendScopes = append(d.SuspendScopes, SuspendScope(s))
	}
	if t := o.Spec.TLS; t != nil {
		d.TrustDomain = cmp.Or(t.TrustDomain, v1alpha1.DefaultTrustDomain)
		d.TLS = SecretRef{Namespace: o.Namespace, Name: t.SecretRef.Name}
	}
	if db := o.Spec.Database; db != nil {
		d.Database = SecretRef{Namespace: o.Namespace, Name: db.SecretRef.Name, Key: cmp.Or(db.SecretRef.Key, v1alpha1.DefaultDSNKey)}
	}
	if c := o.Spec.Cache; c != nil {
		d.Cache = SecretRef{Namespace: o.Namespace, Name: c.SecretRef.Name, Key: cmp.Or(c.SecretRef.Key, v1alpha1.DefaultDSNKey)}
		d.CacheLists = slices.Clone(c.Lists)
	}
	if s := o.Spec.Search; s != nil {
		d.Search = SecretRef{Namespace: o.Namespace, Name: s.SecretRef.Name, Key: cmp.Or(s.SecretRef.Key, v1alpha1.DefaultDSNKey)}
		d.SearchType = cmp.Or(s.Type, v1alpha1.SearchPostgres)
	}
	if o.Spec.LagObjective != nil {
		d.LagObjective = o.Spec.LagObjective.Duration
	}
	return d
}

func (d Deployment) equal(o Deployment) bool {
	return d.Key == o.Key && d.Namespace == o.Namespace && d.Name == o.Name && d.Endpoint == o.Endpoint && d.Version == o.Version &&
		d.Ring == o.Ring && d.Disabled == o.Disabled && d.Suspended == o.Suspended && slices.Equal(d.SuspendScopes, o.SuspendScopes) &&
		d.TrustDomain == o.TrustDomain && d.TLS == o.TLS && d.Database == o.Database &&
		d.Cache == o.Cache && slices.Equal(d.CacheLists, o.CacheLists) &&
		d.Search == o.Search && d.SearchType == o.SearchType && d.LagObjective == o.LagObjective
}
