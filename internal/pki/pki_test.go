package pki

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const domain = "example.org"

func TestParseIdentity(t *testing.T) {
	good := map[string]Identity{
		"spiffe://example.org/service/packages/region/eu":            {TrustDomain: domain, Service: "packages", Region: "eu"},
		"spiffe://example.org/service/packages.example.org/region/a": {TrustDomain: domain, Service: "packages.example.org", Region: "a"},
		"spiffe://example.org/user/alice_B.c-1":                      {TrustDomain: domain, User: "alice_B.c-1"},
	}
	for uri, want := range good {
		got, err := ParseIdentity(uri)
		if err != nil || got != want {
			t.Errorf("ParseIdentity(%q) = %+v, %v, want %+v", uri, got, err, want)
		}
		if got.String() != uri {
			t.Errorf("String() = %q, want %q", got.String(), uri)
		}
	}
	bad := map[string]string{
		"no scheme":            "example.org/user/alice",
		"other scheme":         "https://example.org/user/alice",
		"upper-case scheme":    "SPIFFE://example.org/user/alice",
		"no domain":            "spiffe:///user/alice",
		"port":                 "spiffe://example.org:1/user/alice",
		"user info":            "spiffe://x@example.org/user/alice",
		"no role":              "spiffe://example.org",
		"other role":           "spiffe://example.org/admin/alice",
		"empty user":           "spiffe://example.org/user/",
		"trailing slash":       "spiffe://example.org/user/alice/",
		"query":                "spiffe://example.org/user/alice?x=1",
		"fragment":             "spiffe://example.org/user/alice#x",
		"escape":               "spiffe://example.org/user/al%69ce",
		"no region":            "spiffe://example.org/service/packages",
		"empty region":         "spiffe://example.org/service/packages/region/",
		"upper-case region":    "spiffe://example.org/service/packages/region/EU",
		"deeper":               "spiffe://example.org/service/packages/region/eu/x/y",
		"region before":        "spiffe://example.org/region/eu/service/packages",
		"dots climb":           "spiffe://example.org/service/../region/eu",
		"line feed at the end": "spiffe://example.org/user/alice\n",
	}
	for name, uri := range bad {
		t.Run(name, func(t *testing.T) {
			if id, err := ParseIdentity(uri); err == nil {
				t.Errorf("ParseIdentity(%q) = %v, want an error", uri, id)
			}
		})
	}
}

func TestCARoundTrip(t *testing.T) {
	ca := newCA(t, "one")
	keyPEM, err := ca.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := LoadCA(ca.CertPEM(), keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	pair := issue(t, loaded, Identity{TrustDomain: domain, Service: "packages", Region: "eu"})
	if _, err := Static(pair, ca.CertPEM()); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadCA(pair.CertPEM, pair.KeyPEM); err == nil {
		t.Error("LoadCA of a leaf = nil, want an error")
	}
	if _, err := ca.Deployment(domain, "packages", "EU"); err == nil {
		t.Error("Deployment with an upper-case region = nil, want an error")
	}
	if _, err := Static(KeyPair{CertPEM: pair.CertPEM, KeyPEM: keyPEM}, ca.CertPEM()); err == nil {
		t.Error("Static of another's key = nil, want an error")
	}
}

// Every way a caller can be the wrong one, against one running server, and every way a server can be.
func TestHandshake(t *testing.T) {
	ca, other := newCA(t, "ours"), newCA(t, "theirs")
	eu := Identity{TrustDomain: domain, Service: "packages", Region: "eu"}
	alice := Identity{TrustDomain: domain, User: "alice"}
	source := func(pair KeyPair, err error) Source {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		s, err := Static(pair, ca.CertPEM())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	valid := time.Now().Add(time.Hour)
	addr := serve(t, ServerTLS(source(ca.Issue(eu, valid)), domain))

	t.Run("accepted", func(t *testing.T) {
		for _, id := range []Identity{alice, eu, {TrustDomain: domain, Service: "other", Region: "us"}} {
			resp, err := get(t, "https://"+addr, ClientTLS(source(ca.Issue(id, valid)), eu))
			if err != nil || resp != "HTTP/2.0 "+id.String() {
				t.Errorf("call as %s = %q, %v", id, resp, err)
			}
		}
	})

	callers := map[string]*tls.Config{
		"self-signed":                  ClientTLS(source(selfSigned(t, alice)), eu),
		"expired":                      ClientTLS(source(ca.Issue(alice, time.Now().Add(-time.Minute))), eu),
		"other CA":                     ClientTLS(source(other.Issue(alice, valid)), eu),
		"other trust domain":           ClientTLS(source(ca.Issue(Identity{TrustDomain: "evil.org", User: "alice"}, valid)), eu),
		"common name only":             ClientTLS(source(ca.sign(leaf("packages", nil))), eu),
		"two URI SANs":                 ClientTLS(source(ca.sign(leaf("", []string{eu.String(), alice.String()}))), eu),
		"URI SAN of another role":      ClientTLS(source(ca.sign(leaf("", []string{"spiffe://example.org/admin/root"}))), eu),
		"no certificate":               {InsecureSkipVerify: true, MinVersion: tls.VersionTLS13},
		"TLS 1.2":                      {InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12},
		"server certificate as caller": ClientTLS(source(ca.sign(serverOnly(alice))), eu),
	}
	for name, config := range callers {
		t.Run("caller refused: "+name, func(t *testing.T) {
			if resp, err := get(t, "https://"+addr, config); err == nil {
				t.Errorf("call = %q, want a TLS error", resp)
			}
		})
	}
	t.Run("caller refused: plain text", func(t *testing.T) {
		if resp, err := get(t, "http://"+addr, nil); err == nil && !strings.Contains(resp, "400 Bad Request") {
			t.Errorf("call = %q, want a refusal", resp)
		}
	})

	servers := map[string]Source{
		"self-signed":        source(selfSigned(t, eu)),
		"expired":            source(ca.Issue(eu, time.Now().Add(-time.Minute))),
		"other CA":           source(other.Issue(eu, valid)),
		"other region":       source(ca.Issue(Identity{TrustDomain: domain, Service: "packages", Region: "us"}, valid)),
		"other service":      source(ca.Issue(Identity{TrustDomain: domain, Service: "builds", Region: "eu"}, valid)),
		"other trust domain": source(ca.Issue(Identity{TrustDomain: "evil.org", Service: "packages", Region: "eu"}, valid)),
		"user":               source(ca.Issue(alice, valid)),
		"client certificate": source(ca.sign(leaf("", []string{eu.String()}))),
		"common name only":   source(ca.sign(leaf("packages", nil))),
		"two URI SANs":       source(ca.sign(leaf("", []string{eu.String(), alice.String()}))),
	}
	caller := source(ca.Issue(alice, valid))
	for name, s := range servers {
		t.Run("server refused: "+name, func(t *testing.T) {
			addr := serve(t, ServerTLS(s, domain))
			if resp, err := get(t, "https://"+addr, ClientTLS(caller, eu)); err == nil {
				t.Errorf("call = %q, want a TLS error", resp)
			}
		})
	}
	t.Run("server refused: TLS 1.2", func(t *testing.T) {
		m, err := source(ca.Issue(eu, valid))()
		if err != nil {
			t.Fatal(err)
		}
		addr := serve(t, &tls.Config{Certificates: []tls.Certificate{m.Certificate}, MaxVersion: tls.VersionTLS12})
		if resp, err := get(t, "https://"+addr, ClientTLS(caller, eu)); err == nil {
			t.Errorf("call = %q, want a TLS error", resp)
		}
	})
}

// Renewed files serve at the next handshake, also when the CA changes; half a renewal keeps the last good pair.
func TestFilesReload(t *testing.T) {
	eu := Identity{TrustDomain: domain, Service: "packages", Region: "eu"}
	alice := Identity{TrustDomain: domain, User: "alice"}
	first, second := newCA(t, "first"), newCA(t, "second")
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, content []byte) {
		t.Helper()
		if err := os.WriteFile(path(name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pair := issue(t, first, eu)
	write("cert", pair.CertPEM)
	write("key", pair.KeyPEM)
	write("ca", first.CertPEM())
	var told []error
	source, err := Files(path("cert"), path("key"), path("ca"), func(err error) { told = append(told, err) })
	if err != nil {
		t.Fatal(err)
	}
	addr := serve(t, ServerTLS(source, domain))
	client := func(ca *CA) error {
		t.Helper()
		s, err := Static(issue(t, ca, alice), ca.CertPEM())
		if err != nil {
			t.Fatal(err)
		}
		_, err = get(t, "https://"+addr, ClientTLS(s, eu))
		return err
	}
	if err := client(first); err != nil {
		t.Fatalf("call before the renewal: %v", err)
	}

	renewed := issue(t, second, eu)
	write("cert", renewed.CertPEM)
	if err := client(first); err != nil {
		t.Fatalf("call while the renewal is half written: %v", err)
	}
	if len(told) == 0 {
		t.Error("the half renewal was not reported")
	}
	write("key", renewed.KeyPEM)
	write("ca", second.CertPEM())
	if err := client(second); err != nil {
		t.Fatalf("call after the renewal: %v", err)
	}
	if err := client(first); err == nil {
		t.Error("a caller of the withdrawn CA was accepted")
	}
	if _, err := Files(path("cert"), path("missing"), path("ca"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Files with a missing key = %v, want not exist", err)
	}
}

func newCA(t *testing.T, name string) *CA {
	t.Helper()
	ca, err := NewCA(name)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func issue(t *testing.T, ca *CA, id Identity) KeyPair {
	t.Helper()
	pair, err := ca.Issue(id, time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

// leaf is a certificate for callers as a foreign issuer might make it.
func leaf(commonName string, uris []string) *x509.Certificate {
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(7),
		Subject:      pkix.Name{CommonName: commonName},
		DNSNames:     []string{"localhost"},
		NotBefore:    time.Now().Add(-time.Minute),
		NotAfter:     time.Now().Add(time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			panic(err)
		}
		cert.URIs = append(cert.URIs, u)
	}
	return cert
}

func serverOnly(id Identity) *x509.Certificate {
	cert := leaf("", []string{id.String()})
	cert.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	return cert
}

func selfSigned(t *testing.T, id Identity) (KeyPair, error) {
	t.Helper()
	ca := newCA(t, "self")
	template := leaf("", []string{id.String()})
	template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	der, err := x509.CreateCertificate(rand.Reader, template, template, ca.key.Public(), ca.key)
	if err != nil {
		return KeyPair{}, err
	}
	key, err := ca.KeyPEM()
	return KeyPair{CertPEM: encodePEM("CERTIFICATE", der), KeyPEM: key}, err
}

// serve answers every call with the identity of its caller.
func serve(t *testing.T, config *tls.Config) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{
		TLSConfig:         config,
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          nil,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			id, err := FromCertificate(r.TLS.PeerCertificates[0])
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			_, _ = io.WriteString(w, id.String())
		}),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.ServeTLS(l, "", "")
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		<-done
	})
	return l.Addr().String()
}

func get(t *testing.T, address string, config *tls.Config) (string, error) {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK {
		return resp.Proto + " " + resp.Status, err
	}
	return resp.Proto + " " + string(body), err
}
