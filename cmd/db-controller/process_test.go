package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/config/samples"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/pki"
)

// site is one region of a service whose manager and API server are processes of their own.
type site struct {
	region, dsn  string
	api          string // address
	managerOps   string
	apiOps       string
	certificates string // the TLS secret of its manifest
}

func (s *site) manifest() string {
	return fmt.Sprintf(`apiVersion: meta.dbcontroller.io/v1alpha1
kind: Deployment
metadata: {name: packages.%[1]s}
spec:
  service: packages.example.com
  region: %[1]s
  version: v1
  endpoint: https://%[2]s
  database: {secretRef: {name: %[1]s-database}}
  tls: {secretRef: {name: %[1]s-tls}}
---
apiVersion: v1
kind: Secret
metadata: {name: %[1]s-database}
stringData: {dsn: %[3]q}
---
%[4]s`, s.region, s.api, s.dsn, s.certificates)
}

func secretManifest(name string, pair pki.KeyPair, ca []byte) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: %s}\nstringData: {tls.crt: %q, tls.key: %q, ca.crt: %q}\n", name, pair.CertPEM, pair.KeyPEM, ca)
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// replace renames a complete file into place, as an editor or a mounted ConfigMap does.
func replace(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

const digestSQL = `SELECT count(*), coalesce(md5(string_agg(md5(ROW(name, uuid, epoch, resource_version, meta, body)::text), '' ORDER BY name)), '')
	FROM v1.resources WHERE owning_region = 'eu' AND state <> 2 AND (regions @> '{us}' OR regions @> '{*}')`

func digest(t *testing.T, dsn string) (count int64, hash string) {
	t.Helper()
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	if err := conn.QueryRow(ctx, digestSQL).Scan(&count, &hash); err != nil {
		return 0, err.Error() // not migrated yet
	}
	return count, hash
}

func TestManagersAndAPIServersAsProcesses(t *testing.T) {
	g := NewWithT(t)
	ca, err := pki.NewCA("test")
	g.Expect(err).NotTo(HaveOccurred())
	manifests := t.TempDir()
	g.Expect(os.WriteFile(filepath.Join(manifests, "packages.yaml"), samples.Packages, 0o600)).To(Succeed())
	sites := map[string]*site{}
	for _, region := range []string{"eu", "us"} {
		pair, err := ca.Deployment("db-controller", "packages.example.com", region, "127.0.0.1")
		g.Expect(err).NotTo(HaveOccurred())
		sites[region] = &site{
			region: region, dsn: pgtest.Database(t), api: freeAddress(t), managerOps: freeAddress(t), apiOps: freeAddress(t),
			certificates: secretManifest(region+"-tls", pair, ca.CertPEM()),
		}
		replace(t, filepath.Join(manifests, region+".yaml"), sites[region].manifest())
	}
	eu, us := sites["eu"], sites["us"]
	apiserver := func(s *site) *program {
		return start(t, "apiserver", "--manifests", manifests, "--service", "packages.example.com", "--region", s.region,
			"--bind-address", s.api, "--metrics-bind-address", "", "--health-probe-bind-address", s.apiOps, "--log-format", "text")
	}
	manager := func(s *site) *program {
		return start(t, "manager", "--manifests", manifests, "--region", s.region,
			"--metrics-bind-address", "", "--health-probe-bind-address", s.managerOps, "--log-format", "text")
	}

	// eu is filled before us copies anything, so that there is an initial copy to be killed in.
	apiserver(eu)
	ready(g, eu.apiOps)
	user, err := ca.User("db-controller", "test")
	g.Expect(err).NotTo(HaveOccurred())
	client := clientOf(t, user, ca)
	const packages = 20_000
	fill(g, client, eu, 0, packages)

	apiserver(us)
	for range 3 {
		m := manager(us)
		g.Eventually(func() int64 { n, _ := digest(t, us.dsn); return n }).WithTimeout(2 * time.Minute).WithPolling(5 * time.Millisecond).Should(BeNumerically(">", 0))
		g.Expect(m.cmd.Process.Kill()).To(Succeed())
		<-m.done
	}
	m := manager(us)
	converge := func() {
		g.Eventually(func() string {
			n, hash := digest(t, us.dsn)
			return fmt.Sprint(n, hash)
		}).WithTimeout(3 * time.Minute).WithPolling(200 * time.Millisecond).Should(Equal(func() string {
			n, hash := digest(t, eu.dsn)
			return fmt.Sprint(n, hash)
		}()))
	}
	converge()
	n, _ := digest(t, us.dsn)
	g.Expect(n).To(Equal(int64(packages + 1)))
	ready(g, us.managerOps)

	// Live again, and what an operator sees.
	fill(g, client, eu, packages, 100)
	converge()
	var out bytes.Buffer
	lag := newLag()
	lag.SetArgs([]string{"--endpoint", "http://" + us.managerOps})
	lag.SetOut(&out)
	g.Expect(lag.Execute()).To(Succeed())
	g.Expect(out.String()).To(And(ContainSubstring("FRESHNESS"), ContainSubstring("Live")))
	metrics := fetch(g, "http://"+us.managerOps+"/metrics")
	g.Expect(metrics).To(ContainSubstring(`dbcontroller_sync_freshness_seconds{`))

	// The database of us moves: a new connection string restarts this Deployment, without the process.
	moved := pgtest.Database(t)
	us.dsn = moved
	replace(t, filepath.Join(manifests, "us.yaml"), us.manifest())
	converge()
	m.waitLine(t, "a connection string has changed")

	// A Deployment that is removed stops, and starts again when it is back.
	g.Expect(os.Remove(filepath.Join(manifests, "us.yaml"))).To(Succeed())
	m.waitLine(t, "no longer declared")
	fill(g, client, eu, packages+100, 10)
	replace(t, filepath.Join(manifests, "us.yaml"), us.manifest())
	converge()

	g.Expect(m.cmd.Process.Signal(syscall.SIGTERM)).To(Succeed())
	g.Expect(m.code(t)).To(Equal(0))
}

func ready(g *WithT, ops string) {
	g.Eventually(func() (int, error) {
		res, err := http.Get("http://" + ops + "/readyz")
		if err != nil {
			return 0, err
		}
		defer res.Body.Close()
		return res.StatusCode, nil
	}).WithTimeout(time.Minute).Should(Equal(http.StatusOK))
}

func fetch(g *WithT, url string) string {
	res, err := http.Get(url)
	g.Expect(err).NotTo(HaveOccurred())
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	g.Expect(err).NotTo(HaveOccurred())
	return string(body)
}

func clientOf(t *testing.T, user pki.KeyPair, ca *pki.CA) *http.Client {
	t.Helper()
	certificate, err := tls.X509KeyPair(user.CertPEM, user.KeyPEM)
	if err != nil {
		t.Fatal(err)
	}
	material, err := pki.Parse(user.CertPEM, user.KeyPEM, ca.CertPEM())
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{certificate}, RootCAs: material.Roots}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// fill writes n packages of one section through the REST API.
func fill(g *WithT, client *http.Client, s *site, from, n int) {
	write := func(resources []string) {
		res, err := client.Post("https://"+s.api+"/v1:batchWrite", "application/json", strings.NewReader(`{"writes":[`+strings.Join(resources, ",")+"]}"))
		g.Expect(err).NotTo(HaveOccurred())
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(res.StatusCode).To(Equal(http.StatusOK), string(body[:min(len(body), 500)]))
	}
	write([]string{`{"update":{"allowMissing":true,"resource":{"name":"sections/s","multiRegionPolicy":{"enabledRegions":["eu","us"],"defaultControlRegion":"eu"}}}}`})
	var packages []string
	for i := range n {
		packages = append(packages, fmt.Sprintf(`{"update":{"allowMissing":true,"resource":{"name":"sections/s/packages/p%d","version":"1","description":%q}}}`, from+i, strings.Repeat("d", 500)))
	}
	for batch := range slices.Chunk(packages, 1000) {
		write(batch)
	}
}
