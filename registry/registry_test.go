package registry_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/registry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func deployment(service, region, endpoint string) *v1alpha1.Deployment {
	return &v1alpha1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: service + "." + region},
		Spec:       v1alpha1.DeploymentSpec{Service: service, Region: region, Version: "v1", Endpoint: endpoint},
	}
}

var global = &v1alpha1.MultiRegionPolicy{EnabledRegions: []string{"eu"}, DefaultControlRegion: "eu"}

func service(name, plural string) *v1alpha1.ServiceDescriptor {
	return &v1alpha1.ServiceDescriptor{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: v1alpha1.ServiceDescriptorSpec{Service: name, MultiRegionPolicy: global, Versions: []v1alpha1.ServiceVersion{{Name: "v1", Resources: []v1alpha1.ResourceType{
			{Type: "Thing", Plural: plural, Patterns: []string{plural + "/{thing}"}}}}}},
	}
}

// model is a topology that a subscriber builds from events alone.
type model struct {
	deployments map[registry.Key]registry.Deployment
	services    map[string]*descriptor.Service
}

// apply returns what is wrong with an event, given those before it.
func (m *model) apply(e registry.Event) error {
	if _, synced := e.(registry.SyncEvent); synced != (m.deployments == nil) {
		return fmt.Errorf("%T: SyncEvent must be the first event, and only the first", e)
	}
	switch e := e.(type) {
	case registry.SyncEvent:
		m.deployments, m.services = map[registry.Key]registry.Deployment{}, map[string]*descriptor.Service{}
		for _, d := range e.View.Deployments() {
			m.deployments[d.Key] = d
		}
		for _, s := range e.View.Services() {
			m.services[s.Name] = s
		}
	case registry.DeploymentSetEvent:
		was, had := m.deployments[e.Deployment.Key]
		if had != (e.Previous != nil) || had && was.String() != e.Previous.String() {
			return fmt.Errorf("set of %s: previous is %v, but was %v", e.Deployment, e.Previous, was)
		}
		if had && was.Endpoint == e.Deployment.Endpoint && was.Suspended == e.Deployment.Suspended {
			return fmt.Errorf("set of %s changes nothing", e.Deployment)
		}
		m.deployments[e.Deployment.Key] = e.Deployment
	case registry.DeploymentRemovedEvent:
		if _, had := m.deployments[e.Previous.Key]; !had {
			return fmt.Errorf("removed %s, which was unknown", e.Previous)
		}
		delete(m.deployments, e.Previous.Key)
	case registry.ServiceSetEvent:
		if m.services[e.Service.Name] != e.Previous || e.Service == e.Previous {
			return fmt.Errorf("set of service %s: wrong previous state", e.Service.Name)
		}
		m.services[e.Service.Name] = e.Service
	case registry.ServiceRemovedEvent:
		if m.services[e.Previous.Name] != e.Previous {
			return fmt.Errorf("removed service %s, which was unknown", e.Previous.Name)
		}
		delete(m.services, e.Previous.Name)
	}
	return nil
}

func (m *model) equals(v *registry.View) bool {
	if len(m.deployments) != len(v.Deployments()) || len(m.services) != len(v.Services()) {
		return false
	}
	for _, d := range v.Deployments() {
		if m.deployments[d.Key].String() != d.String() || m.deployments[d.Key].Suspended != d.Suspended {
			return false
		}
	}
	for _, s := range v.Services() {
		if m.services[s.Name] != s {
			return false
		}
	}
	return true
}

// However changes and subscribers interleave, the events of each lead to the last view.
func TestEventsLeadToTheView(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	random := func() registry.Snapshot {
		var s registry.Snapshot
		for _, name := range []string{"a.example.com", "b.example.com"} {
			if rng.IntN(4) > 0 {
				s.Services = append(s.Services, service(name, []string{"things", "stuff", "bad plural"}[rng.IntN(3)]))
			}
			for _, region := range []string{"ap", "eu", "us"} {
				if rng.IntN(3) > 0 {
					d := deployment(name, region, fmt.Sprintf("https://%d", rng.IntN(2)))
					d.Spec.Suspend = rng.IntN(2) == 0
					s.Deployments = append(s.Deployments, d)
				}
			}
		}
		rng.Shuffle(len(s.Deployments), func(i, j int) { s.Deployments[i], s.Deployments[j] = s.Deployments[j], s.Deployments[i] })
		return s
	}

	reg := registry.New()
	ctx, cancel := context.WithCancel(t.Context())
	finished := make(chan struct{}) // closed after the last Apply
	var subscribers sync.WaitGroup
	for i := range 8 {
		local := rand.New(rand.NewPCG(seed, uint64(i)+1))
		subscribers.Go(func() {
			var m model
			for e := range reg.Subscribe(ctx) {
				if err := m.apply(e); err != nil {
					t.Errorf("subscriber %d: %v", i, err)
					return
				}
				if local.IntN(4) == 0 { // a consumer that is slower than others
					for range local.IntN(200) {
						runtime.Gosched()
					}
				}
				select {
				case <-finished:
					if m.equals(reg.View()) {
						return
					}
				default:
				}
			}
			t.Errorf("subscriber %d never reached the last view", i)
		})
	}
	for range 500 {
		reg.Apply(random())
	}
	close(finished)
	// One more change, so that those who had caught up before finished was closed look again.
	reg.Apply(registry.Snapshot{Deployments: []*v1alpha1.Deployment{deployment("last.example.com", "eu", "https://last")}})
	done := time.AfterFunc(30*time.Second, cancel)
	subscribers.Wait()
	done.Stop()
	cancel()
}

func TestWaitSynced(t *testing.T) {
	reg := registry.New()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := reg.WaitSynced(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("WaitSynced before Apply = %v, want the context's error", err)
	}
	if reg.Synced() || len(reg.View().Deployments()) != 0 {
		t.Error("a new registry must be empty and not synced")
	}
	for range reg.Subscribe(ctx) {
		t.Error("an event before Apply")
	}
	reg.Apply(registry.Snapshot{})
	if err := reg.WaitSynced(t.Context()); err != nil || !reg.Synced() {
		t.Errorf("WaitSynced after an empty Apply = %v", err)
	}
}

func TestServiceComesBeforeAndGoesAfterItsDeployments(t *testing.T) {
	reg := registry.New()
	reg.Apply(registry.Snapshot{})
	var got []string
	steps := []registry.Snapshot{
		{Services: []*v1alpha1.ServiceDescriptor{service("a.example.com", "things")}, Deployments: []*v1alpha1.Deployment{deployment("a.example.com", "eu", "https://eu")}},
		{},
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for e := range reg.Subscribe(ctx) {
		got = append(got, strings.TrimPrefix(fmt.Sprintf("%T", e), "registry."))
		if _, removed := e.(registry.ServiceRemovedEvent); removed {
			break
		}
		if len(got) == 1 || len(got) == 3 {
			if problems := reg.Apply(steps[0]); len(problems) > 0 {
				t.Fatal(problems)
			}
			steps = steps[1:]
		}
	}
	want := "SyncEvent ServiceSetEvent DeploymentSetEvent DeploymentRemovedEvent ServiceRemovedEvent"
	if s := strings.Join(got, " "); s != want {
		t.Errorf("events %s, want %s", s, want)
	}
}

func TestRingOfAService(t *testing.T) {
	old := deployment("a.example.com", "eu", "https://eu")
	newcomer := deployment("a.example.com", "ap", "https://ap")
	newcomer.Spec.Shards = 8
	reg := registry.New()
	reg.Apply(registry.Snapshot{Deployments: []*v1alpha1.Deployment{old}})
	problems := reg.Apply(registry.Snapshot{Deployments: []*v1alpha1.Deployment{newcomer, old}})
	if len(problems) != 1 || problems[0].Reason != registry.InvalidDeployment || problems[0].Object.Name != "a.example.com.ap" {
		t.Errorf("problems %v, want the newcomer refused although it is listed first", problems)
	}
	if problems := reg.Apply(registry.Snapshot{Deployments: []*v1alpha1.Deployment{newcomer}}); len(problems) != 0 {
		t.Errorf("problems %v, want none once the old ring is gone", problems)
	}
}

func TestNothingSecretInString(t *testing.T) {
	d := registry.DeploymentOf(deployment("a.example.com", "eu", "https://admin:hunter2@eu.example.com"))
	for _, s := range []string{d.String(), fmt.Sprintf("%v %+v", d, d)} {
		if strings.Contains(s, "hunter2") {
			t.Errorf("%s shows a password", s)
		}
	}
}

func TestSuspends(t *testing.T) {
	for name, c := range map[string]struct {
		all    bool
		scopes []registry.SuspendScope
		want   bool
	}{
		"nothing":         {false, nil, false},
		"all":             {true, nil, true},
		"peer":            {false, []registry.SuspendScope{{PeerRegion: "us"}}, true},
		"other peer":      {false, []registry.SuspendScope{{PeerRegion: "ap"}}, false},
		"second scope":    {false, []registry.SuspendScope{{PeerRegion: "ap"}, {PeerRegion: "us"}}, true},
		"all and a scope": {true, []registry.SuspendScope{{PeerRegion: "ap"}}, true},
	} {
		t.Run(name, func(t *testing.T) {
			if got := (registry.Deployment{Suspended: c.all, SuspendScopes: c.scopes}).Suspends("us"); got != c.want {
				t.Errorf("Suspends = %v, want %v", got, c.want)
			}
		})
	}
}

func TestMetrics(t *testing.T) {
	reg := registry.New()
	reg.Apply(registry.Snapshot{Deployments: []*v1alpha1.Deployment{deployment("a.example.com", "eu", "https://1"), deployment("a.example.com", "eu", "https://2")}})
	want := `
# HELP dbcontroller_registry_objects Objects of the topology that are in force.
# TYPE dbcontroller_registry_objects gauge
dbcontroller_registry_objects{kind="Deployment"} 1
dbcontroller_registry_objects{kind="ServiceDescriptor"} 0
# HELP dbcontroller_registry_problems Objects and manifests that are not in force as written.
# TYPE dbcontroller_registry_problems gauge
dbcontroller_registry_problems{reason="Conflict"} 1
dbcontroller_registry_problems{reason="InvalidDeployment"} 0
dbcontroller_registry_problems{reason="InvalidDescriptor"} 0
dbcontroller_registry_problems{reason="InvalidManifest"} 0
`
	if err := testutil.CollectAndCompare(reg, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
}
