package pki

import (
	"crypto/x509"
	"fmt"
	"net/url"
	"regexp"
	"strings"
)

// Identity is who a certificate speaks for: a Deployment (Service and Region set) or a user (User set), never both.
// The zero Identity is nobody. Identities can be compared with ==.
type Identity struct {
	TrustDomain string
	Service     string
	Region      string
	User        string
}

// IsDeployment says whether i is one Service in one Region.
func (i Identity) IsDeployment() bool { return i.Service != "" }

// IsUser says whether i is a user.
func (i Identity) IsUser() bool { return i.User != "" }

// String returns the URI of i, or "anonymous" for nobody.
func (i Identity) String() string {
	switch {
	case i.IsDeployment():
		return "spiffe://" + i.TrustDomain + "/service/" + i.Service + "/region/" + i.Region
	case i.IsUser():
		return "spiffe://" + i.TrustDomain + "/user/" + i.User
	}
	return "anonymous"
}

// The alphabets leave nothing to escape, so an identity has exactly one spelling.
var (
	domainPattern = regexp.MustCompile(`^[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?$`)
	labelPattern  = regexp.MustCompile(`^[a-z0-9]([-.a-z0-9]{0,61}[a-z0-9])?$`)
	userPattern   = regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}$`)
)

// Validate says what is wrong with i, or nil.
func (i Identity) Validate() error {
	switch {
	case !domainPattern.MatchString(i.TrustDomain):
		return fmt.Errorf("trust domain %q: want a lower-case DNS name", i.TrustDomain)
	case i.IsUser() && (i.Service != "" || i.Region != ""):
		return fmt.Errorf("identity is a user and a Deployment at once")
	case i.IsUser():
		if !userPattern.MatchString(i.User) {
			return fmt.Errorf("user %q: want letters, digits, dot, dash or underscore", i.User)
		}
	case !labelPattern.MatchString(i.Service):
		return fmt.Errorf("service %q: want lower-case letters, digits, dots and dashes, at most 63", i.Service)
	case !labelPattern.MatchString(i.Region):
		return fmt.Errorf("region %q: want lower-case letters, digits, dots and dashes, at most 63", i.Region)
	}
	return nil
}

// ParseIdentity reads what String wrote and refuses every other spelling.
func ParseIdentity(uri string) (Identity, error) {
	rest, ok := strings.CutPrefix(uri, "spiffe://")
	if !ok {
		return Identity{}, fmt.Errorf("identity %q: want a spiffe:// URI", uri)
	}
	var id Identity
	switch parts := strings.Split(rest, "/"); {
	case len(parts) == 5 && parts[1] == "service" && parts[3] == "region":
		id = Identity{TrustDomain: parts[0], Service: parts[2], Region: parts[4]}
	case len(parts) == 3 && parts[1] == "user":
		id = Identity{TrustDomain: parts[0], User: parts[2]}
	default:
		return Identity{}, fmt.Errorf("identity %q: want /service/<service>/region/<region> or /user/<name>", uri)
	}
	if err := id.Validate(); err != nil {
		return Identity{}, fmt.Errorf("identity %q: %w", uri, err)
	}
	return id, nil
}

// FromCertificate returns the identity of a verified certificate: that of its only URI SAN. The common name is never read.
func FromCertificate(cert *x509.Certificate) (Identity, error) {
	if len(cert.URIs) != 1 {
		return Identity{}, fmt.Errorf("certificate %s has %d URI SANs: want exactly one", cert.SerialNumber, len(cert.URIs))
	}
	return ParseIdentity(cert.URIs[0].String())
}

func (i Identity) url() (*url.URL, error) {
	if err := i.Validate(); err != nil {
		return nil, err
	}
	return url.Parse(i.String())
}
