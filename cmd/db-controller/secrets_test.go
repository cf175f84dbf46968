package main

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/config/samples"
	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/pki"
)

// S8 of docs/security.md: what the processes log, show to the operator and have on their command lines while their database refuses the password. There is no pprof.
func TestProcessesShowNoSecrets(t *testing.T) {
	g := NewWithT(t)
	const password = "cAnArY-pAsSwOrD-4711"
	pg := pgtest.Server(t, pgserver.Config{TCP: true})
	dsn, err := pg.TCPDSN(pg.Addr(), "postgres")
	g.Expect(err).NotTo(HaveOccurred())
	u, err := url.Parse(dsn)
	g.Expect(err).NotTo(HaveOccurred())
	u.User = url.UserPassword(u.User.Username(), password)
	ca, err := pki.NewCA("test")
	g.Expect(err).NotTo(HaveOccurred())
	pair, err := ca.Deployment("db-controller", "packages.example.com", "eu", "127.0.0.1")
	g.Expect(err).NotTo(HaveOccurred())
	manifests := t.TempDir()
	g.Expect(os.WriteFile(filepath.Join(manifests, "packages.yaml"), samples.Packages, 0o600)).To(Succeed())
	eu := &site{region: "eu", dsn: u.String(), api: freeAddress(t), certificates: secretManifest("eu-tls", pair, ca.CertPEM())}
	replace(t, filepath.Join(manifests, "eu.yaml"), eu.manifest())
	clean := func(what, text string) {
		t.Helper()
		for _, secret := range []string{password, password[:12], "PRIVATE KEY"} {
			g.Expect(strings.Contains(text, secret)).To(BeFalse(), "%s has %q", what, secret)
		}
	}
	for _, command := range []string{"manager", "apiserver"} {
		ops := freeAddress(t)
		p := start(t, command, "--manifests", manifests, "--region", "eu", "--service", "packages.example.com", "--metrics-bind-address", "", "--health-probe-bind-address", ops, "--log-level", "debug")
		get := func(path string) (int, string) {
			res, err := http.Get("http://" + ops + path)
			if err != nil {
				return 0, err.Error()
			}
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			g.Expect(err).NotTo(HaveOccurred())
			return res.StatusCode, string(body)
		}
		g.Eventually(func() string { _, text := get("/statusz"); return text }).WithTimeout(time.Minute).Should(ContainSubstring("password authentication failed"))
		for _, path := range []string{"/statusz", "/metrics", "/readyz?verbose", "/healthz"} {
			_, text := get(path)
			clean(command+path, text)
		}
		for _, path := range []string{"/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/cmdline", "/debug/vars", "/config"} {
			status, _ := get(path)
			g.Expect(status).To(Equal(http.StatusNotFound), path)
		}
		for _, file := range []string{"cmdline", "environ"} {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.cmd.Process.Pid, file))
			g.Expect(err).NotTo(HaveOccurred())
			clean(command+"'s "+file, string(text))
		}
		p.waitLine(t, "Deployment does not run")
		g.Expect(p.cmd.Process.Signal(syscall.SIGTERM)).To(Succeed())
		g.Expect(p.code(t)).To(Equal(0))
		clean("the log of "+command, p.stderr.String()+p.stdout.String())
	}
	http.DefaultClient.CloseIdleConnections()
}
