package security

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/dbcontroller/db-controller/internal/pki"
)

// authority is a CA that issues what package pki would not.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "security test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	check(t, err)
	cert, err := x509.ParseCertificate(der)
	check(t, err)
	return &authority{cert, key}
}

func (a *authority) pem() []byte { return encode("CERTIFICATE", a.cert.Raw) }

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// issue signs a certificate for client and server with these URI SANs, which may be none, after change.
func (a *authority) issue(t testing.TB, change func(*x509.Certificate), uris ...string) pki.KeyPair {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	for _, u := range uris {
		parsed, err := url.Parse(u)
		check(t, err)
		template.URIs = append(template.URIs, parsed)
	}
	if change != nil {
		change(template)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	parent, signer := a.cert, a.key
	if a.key == nil { // nobody: it signs itself
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	check(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	check(t, err)
	return pki.KeyPair{CertPEM: encode("CERTIFICATE", der), KeyPEM: encode("PRIVATE KEY", keyDER)}
}

func (a *authority) source(t testing.TB, id pki.Identity) pki.Source {
	t.Helper()
	s, err := pki.Static(a.issue(t, nil, id.String()), a.pem())
	check(t, err)
	return s
}

// badCertificate is one with which nobody may come in.
type badCertificate struct {
	situation string
	reason    string // label of the metric
	config    *tls.Config
}

// badCertificates are of alice, or of a peer, and wrong in one respect each.
func badCertificates(t testing.TB, ca *authority) []badCertificate {
	t.Helper()
	pair := func(p pki.KeyPair) *tls.Config {
		c, err := tls.X509KeyPair(p.CertPEM, p.KeyPEM)
		check(t, err)
		config := insecure(c)
		// A client sends only what fits to the CAs that the server names, unless it insists.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c, nil }
		return config
	}
	us := identity(packagesUS).String()
	cn := func(name string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.Subject.CommonName = name }
	}
	noCertificate := insecure(tls.Certificate{})
	noCertificate.Certificates = nil
	old := pair(ca.issue(t, nil, us))
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	return []badCertificate{
		{"TLS 1.2", "tls_version", old},
		{"no certificate", "no_certificate", noCertificate},
		{"self-signed", "unknown_authority", pair((&authority{}).issue(t, nil, us))},
		{"of another CA", "unknown_authority", pair(newAuthority(t).issue(t, nil, us))},
		{"expired", "expired", pair(ca.issue(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }, us))},
		{"not valid yet", "not_yet_valid", pair(ca.issue(t, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }, us))},
		{"for servers only", "bad_certificate", pair(ca.issue(t, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, us))},
		{"of another trust domain", "wrong_identity", pair(ca.issue(t, nil, "spiffe://evil.org/user/alice"))},
		{"a common name only", "wrong_identity", pair(ca.issue(t, cn(us)))},
		{"a host name only", "wrong_identity", pair(ca.issue(t, func(c *x509.Certificate) { c.DNSNames = []string{"us.packages.example.com"} }))},
		{"two URI SANs", "wrong_identity", pair(ca.issue(t, nil, us, alice.String()))},
		{"a wildcard region", "wrong_identity", pair(ca.issue(t, nil, "spiffe://"+domain+"/service/"+packages+"/region/*"))},
		{"a wildcard service", "wrong_identity", pair(ca.issue(t, nil, "spiffe://"+domain+"/service/*/region/us"))},
		{"another role", "wrong_identity", pair(ca.issue(t, nil, "spiffe://"+domain+"/admin/root"))},
	}
}
