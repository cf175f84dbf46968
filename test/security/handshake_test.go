package security

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dbcontroller/db-controller/internal/pki"
)

// S1: whoever cannot prove who it is comes no further than the handshake, while others are served. No method is entered, nothing changes, and the refusal is counted by its
// reason. Package pki's TestHandshake has the same of a bare server, and the callers' side.
func TestHandshakes(t *testing.T) {
	w := newWorld(t, config{only: []key{packagesEU}, unmanaged: true})
	p := w.places[packagesEU]
	w.save(packagesEU, "sections/s", `{"n":1}`)
	before := p.rows(t)

	ctx, stop := context.WithCancel(t.Context())
	var load sync.WaitGroup
	var served, failed atomic.Int64
	good := w.client(alice, packagesEU)
	load.Go(func() {
		for ctx.Err() == nil {
			status, _, err := request(ctx, good, "GET", p.endpoint+"/v1/sections/s", nil, "")
			switch {
			case err == nil && status == http.StatusOK:
				served.Add(1)
			case ctx.Err() == nil:
				failed.Add(1)
			}
		}
	})

	for _, c := range badCertificates(t, w.ca) {
		t.Run(c.situation, func(t *testing.T) {
			count := func() float64 { return p.metric(t, "dbcontroller_tls_handshake_errors_total", "reason", c.reason) }
			refusals := count()
			transport := &http.Transport{TLSClientConfig: c.config, ForceAttemptHTTP2: true}
			defer transport.CloseIdleConnections()
			client := &http.Client{Transport: transport, Timeout: 20 * time.Second}
			// A deletion: had it been let in, there would be something to see.
			if status, text, err := request(t.Context(), client, "DELETE", p.endpoint+"/v1/sections/s", nil, ""); err == nil {
				t.Errorf("answered %d %s", status, text)
			}
			eventually(t, 10*time.Second, "the refusal is counted as "+c.reason, func() error {
				if n := count() - refusals; n < 1 {
					return fmt.Errorf("%v, all: %v", n, p.metric(t, "dbcontroller_tls_handshake_errors_total"))
				}
				return nil
			})
		})
	}
	t.Run("plain text", func(t *testing.T) {
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.endpoint, "https://"))
		check(t, err)
		defer conn.Close()
		check(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
		_, err = fmt.Fprint(conn, "POST /v1/sections?id=x HTTP/1.1\r\nHost: eu\r\n\r\n")
		check(t, err)
		if line, _ := bufio.NewReader(conn).ReadString('\n'); !strings.Contains(line, "400") {
			t.Errorf("answered %q, want 400 in plain text", line)
		}
		eventually(t, 10*time.Second, "the refusal is counted", func() error {
			if p.metric(t, "dbcontroller_tls_handshake_errors_total", "reason", "plain_text") == 0 {
				return fmt.Errorf("not yet")
			}
			return nil
		})
	})
	stop()
	load.Wait()
	if failed.Load() > 0 || served.Load() == 0 {
		t.Errorf("meanwhile %d calls of others were served, and %d failed", served.Load(), failed.Load())
	}
	if n := p.metric(t, "dbcontroller_requests_total", "method", "Resources/Delete"); n != 0 {
		t.Errorf("Delete was entered %v times", n)
	}
	if after := p.rows(t); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("tables are\n%v, were\n%v", after, before)
	}
}

// S1: a CA that takes the place of another while the server runs is honored at the next handshake, and the other no more.
func TestCASwappedWhileRunning(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, content []byte) {
		path := filepath.Join(dir, name)
		check(t, os.WriteFile(path+".new", content, 0o600))
		check(t, os.Rename(path+".new", path))
	}
	var first *authority
	w := newWorld(t, config{only: []key{packagesEU}, unmanaged: true, tls: func(w *world, k key) pki.Source {
		first = w.ca
		pair := first.issue(t, nil, identity(k).String())
		write("crt", pair.CertPEM)
		write("key", pair.KeyPEM)
		write("ca", first.pem())
		s, err := pki.Files(filepath.Join(dir, "crt"), filepath.Join(dir, "key"), filepath.Join(dir, "ca"), nil)
		check(t, err)
		return s
	}})
	p := w.places[packagesEU]
	second := newAuthority(t)
	get := func(of *authority) error {
		// A connection of its own each time.
		transport := pki.Transport(of.source(t, alice), identity(packagesEU), nil)
		defer transport.CloseIdleConnections()
		_, _, err := request(t.Context(), &http.Client{Transport: transport, Timeout: 10 * time.Second}, "GET", p.endpoint+"/v1/sections", nil, "")
		return err
	}
	check(t, get(first))
	if err := get(second); err == nil {
		t.Fatal("a caller of the CA to come was let in")
	}
	pair := second.issue(t, nil, identity(packagesEU).String())
	write("crt", pair.CertPEM)
	write("key", pair.KeyPEM)
	write("ca", second.pem())
	eventually(t, 5*time.Second, "the new CA is honored", func() error { return get(second) })
	if err := get(first); err == nil {
		t.Error("a caller of the withdrawn CA was let in")
	}
}
