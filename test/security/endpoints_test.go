package security

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/dialguard"
	"github.com/dbcontroller/db-controller/internal/pki"
)

// trap is a listener on this machine that must never be connected to.
type trap struct {
	net.Listener
	caught atomic.Int64
}

func newTrap(t *testing.T) *trap {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	tr := &trap{Listener: l}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			tr.caught.Add(1)
			c.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return tr
}

func (tr *trap) port() string {
	_, port, _ := net.SplitHostPort(tr.Addr().String())
	return port
}

// S6: another region's endpoint leads to this machine. No part of a Deployment connects to it, not the copies, nor the forwarding of writes, nor references; the status says which field
// is wrong and not what is there. All addresses and spellings are in package dialguard's own tests.
func TestForbiddenEndpoints(t *testing.T) {
	t.Parallel()
	tr := newTrap(t)
	w := newWorld(t, config{only: []key{packagesEU}, alter: func(c *deployment.Config) {
		c.DialContext = dialguard.New(dialguard.Config{Denied: []string{"192.0.2.1"}}).DialContext
	}})
	p := w.places[packagesEU]
	for _, host := range []string{"127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]", "0.0.0.0"} {
		t.Run(host, func(t *testing.T) {
			for _, d := range w.snapshot.Deployments {
				if d.Spec.Region == "us" {
					d.Spec.Endpoint = "https://" + host + ":" + tr.port()
				}
			}
			w.publish()
			status, text := w.rest(w.client(alice, packagesEU), packagesEU, "PATCH", "/regions/us/mirrors/m?allow_missing=true", `{}`)
			if status != http.StatusServiceUnavailable || strings.Contains(text, "127.0.0.1") || strings.Contains(text, tr.port()) {
				t.Errorf("a write for us = %d %s, want that us cannot be reached, and nothing of where it is", status, text)
			}
			eventually(t, 30*time.Second, "the status tells", func() error {
				for _, s := range p.open.Peers() {
					if s.Region == "us" && strings.Contains(s.LastError, "wrong_endpoint: ") && strings.Contains(s.LastError, fmt.Sprintf("spec.endpoint: host %q", strings.Trim(host, "[]"))) {
						return nil
					}
				}
				return fmt.Errorf("peers are %s", asJSON(p.open.Peers()))
			})
		})
	}
	if n := tr.caught.Load(); n > 0 {
		t.Errorf("%d connections came in", n)
	}
	if n := p.metric(t, "dbcontroller_sync_errors_total", "reason", "wrong_endpoint"); n == 0 {
		t.Error("the refusals are not counted as wrong_endpoint")
	}
	if strings.Contains(p.log.String(), `"level":"ERROR"`) {
		t.Error("somebody else's endpoint is an error of ours in the log")
	}
}

// S6: a region that answers with a redirect sends nobody anywhere, whichever method was called.
func TestRedirectsAreNotFollowed(t *testing.T) {
	t.Parallel()
	tr := newTrap(t)
	w := newWorld(t, config{only: []key{packagesEU}})
	var asked atomic.Int64
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	codes := []int{http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect}
	srv := &http.Server{ReadHeaderTimeout: time.Second, TLSConfig: pki.ServerTLS(w.ca.source(t, identity(packagesUS)), domain), Handler: http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		http.Redirect(out, r, "https://"+tr.Addr().String()+r.URL.Path, codes[int(asked.Add(1))%len(codes)])
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.ServeTLS(l, "", "")
	}()
	t.Cleanup(func() {
		srv.Close()
		<-done
	})
	for _, d := range w.snapshot.Deployments {
		if d.Spec.Region == "us" && d.Spec.Service == packages {
			d.Spec.Endpoint = "https://" + l.Addr().String()
		}
	}
	w.publish()
	for i := range 2 * len(codes) {
		if status, text := w.rest(w.client(alice, packagesEU), packagesEU, "PATCH", fmt.Sprintf("/regions/us/mirrors/m%d?allow_missing=true", i), `{}`); status == http.StatusOK {
			t.Errorf("a write for us = %d %s", status, text)
		}
	}
	eventually(t, 30*time.Second, "all are asked", func() error {
		if n := asked.Load(); n < 20 {
			return fmt.Errorf("%d times", n)
		}
		return nil
	})
	if n := tr.caught.Load(); n > 0 {
		t.Errorf("%d connections followed a redirect", n)
	}
}
