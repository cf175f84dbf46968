package deployment_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/redisserver"
	"github.com/dbcontroller/db-controller/registry"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

// TestCache serves one Deployment with a cache (F37): by one setting, and a wrong one costs no more than the cache.
func TestCache(t *testing.T) {
	const service = "notes.example.com"
	for _, c := range []struct {
		name, url string
		hits      bool
	}{
		{"on", redisserver.New(t, nil).URL(), true},
		{"wrong", "http://nonsense", false},
		{"off", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := &v1alpha1.Deployment{}
			spec.Spec = v1alpha1.DeploymentSpec{Service: service, Region: "eu", Version: "v1", Endpoint: "http://127.0.0.1:1",
				Cache: &v1alpha1.CacheSpec{SecretRef: v1alpha1.SecretKeyRef{Name: "redis"}, Lists: []string{"Note"}}}
			descriptor := &v1alpha1.ServiceDescriptor{}
			descriptor.Spec = v1alpha1.ServiceDescriptorSpec{Service: service, MultiRegionPolicy: &v1alpha1.MultiRegionPolicy{EnabledRegions: []string{"eu"}, DefaultControlRegion: "eu"},
				Versions: []v1alpha1.ServiceVersion{{Name: "v1", Resources: []v1alpha1.ResourceType{{Type: "Note", Plural: "notes", Patterns: []string{"notes/{note}"}}}}}}
			reg := registry.New()
			if problems := reg.Apply(registry.Snapshot{Deployments: []*v1alpha1.Deployment{spec}, Services: []*v1alpha1.ServiceDescriptor{descriptor}}); len(problems) > 0 {
				t.Fatal(problems)
			}
			d, err := deployment.Open(t.Context(), deployment.Config{Key: registry.Key{Service: service, Region: "eu"}, Registry: reg, DSN: pgtest.Database(t),
				CacheURL: c.url, Logger: slog.New(slog.DiscardHandler)})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			serve, err := d.Server(l)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			ended := make(chan error, 1)
			go func() { ended <- d.Run(ctx, serve) }()
			defer func() {
				cancel()
				if err := <-ended; err != nil {
					t.Error(err)
				}
			}()

			call := func(method, path, body string) string {
				t.Helper()
				req, err := http.NewRequestWithContext(t.Context(), method, "http://"+l.Addr().String()+"/v1/"+path, strings.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("Content-Type", "application/json")
				res, err := http.DefaultClient.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				text, err := io.ReadAll(res.Body)
				if err != nil || res.StatusCode != http.StatusOK {
					t.Fatalf("%s %s: %s %s %v", method, path, res.Status, text, err)
				}
				return string(text)
			}
			defer http.DefaultClient.CloseIdleConnections()
			call("POST", "notes?id=n", `{"n":0}`)
			hits := func() (resources, pages float64) {
				families, err := d.Metrics().Gather()
				if err != nil {
					t.Fatal(err)
				}
				for _, f := range families {
					if f.GetName() == "dbcontroller_cache_requests_total" {
						for _, m := range f.GetMetric() {
							labels := map[string]string{}
							for _, l := range m.GetLabel() {
								labels[l.GetName()] = l.GetValue()
							}
							if labels["result"] != "hit" {
								continue
							}
							if labels["read"] == "page" {
								pages = m.GetCounter().GetValue()
							} else {
								resources = m.GetCounter().GetValue()
							}
						}
					}
				}
				return resources, pages
			}
			deadline := time.Now().Add(20 * time.Second)
			for n := 1; ; n++ {
				call("PATCH", "notes/n?update_mask=n", fmt.Sprintf(`{"n":%d}`, n))
				for range 5 {
					for _, path := range []string{"notes/n", "notes"} {
						if got, want := call("GET", path, ""), fmt.Sprintf(`"n":%d`, n); !strings.Contains(strings.ReplaceAll(got, " ", ""), want) {
							t.Fatalf("after a write %s = %s, want %s", path, got, want)
						}
					}
				}
				resources, pages := hits()
				if !c.hits && n == 5 {
					if resources+pages > 0 {
						t.Errorf("%v hits without a cache", resources+pages)
					}
					return
				}
				if c.hits && resources > 0 && pages > 0 {
					return
				}
				if time.Now().After(deadline) {
					t.Fatalf("%v resources and %v pages came from the cache", resources, pages)
				}
			}
		})
	}
}
