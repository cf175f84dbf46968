package lease_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	coordinationclient "k8s.io/client-go/kubernetes/typed/coordination/v1"
	"k8s.io/client-go/rest"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/kubetest"
	"github.com/dbcontroller/db-controller/nodemanager"
	"github.com/dbcontroller/db-controller/nodemanager/lease"
	"github.com/dbcontroller/db-controller/nodemanager/membershiptest"
)

var cluster *kubetest.Cluster

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	var err error
	cluster, err = kubetest.Start()
	if errors.Is(err, kubetest.ErrNoAssets) {
		fmt.Println("SKIPPED, nothing of the Leases is tested against an API server:", err)
		cluster = nil
	} else if err != nil {
		fmt.Println(err)
		return 1
	}
	code := m.Run()
	if cluster != nil {
		if err := cluster.Stop(); err != nil {
			fmt.Println(err)
			code = 1
		}
	}
	if code == 0 {
		if err := goleak.Find(
			// klog's own, for as long as the process lives; and connections of the tests' own client.
			goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"), goleak.IgnoreTopFunction("net/http.(*persistConn).readLoop"),
			goleak.IgnoreTopFunction("net/http.(*persistConn).writeLoop")); err != nil {
			fmt.Println(err)
			code = 1
		}
	}
	return code
}

// timing is short, and long enough for a busy machine.
var timing = nodemanager.Timing{Lease: 4 * time.Second, RenewDeadline: 2500 * time.Millisecond, RetryPeriod: 500 * time.Millisecond}

// place is a ring of Leases, reached through a network that can be cut.
type place struct {
	prefix string
	mu     sync.Mutex
	cut    map[string]bool
	conns  map[string][]net.Conn
}

func newPlace(t *testing.T) *place {
	if cluster == nil {
		t.Skip("no kube-apiserver")
	}
	t.Parallel()
	return &place{prefix: lease.Prefix("test", fmt.Sprintf("%x", time.Now().UnixNano()), "eu"), cut: map[string]bool{}, conns: map[string][]net.Conn{}}
}

func (p *place) Member(name string) nodemanager.Membership {
	cfg := rest.CopyConfig(cluster.Config)
	cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		p.mu.Lock()
		cut := p.cut[name]
		p.mu.Unlock()
		if cut {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		c, err := (&net.Dialer{}).DialContext(ctx, network, address)
		if err == nil {
			p.mu.Lock()
			p.conns[name] = append(p.conns[name], c)
			p.mu.Unlock()
		}
		return c, err
	}
	m, err := lease.New(lease.Config{
		Client: cfg, Namespace: "default", Prefix: p.prefix, Replica: name, Kinds: []string{membershiptest.Kind, "other"}, Timing: timing,
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		panic(err)
	}
	return m
}

func (p *place) Cut(name string, cut bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut[name] = cut
	for _, c := range p.conns[name] {
		_ = c.Close() // it may be closed
	}
	p.conns[name] = nil
}

func (p *place) Timing() nodemanager.Timing { return timing }

func TestMembership(t *testing.T) {
	membershiptest.Run(t, func(t *testing.T, f func(*testing.T, membershiptest.Place)) { f(t, newPlace(t)) })
}

func TestConfigIsChecked(t *testing.T) {
	good := lease.Config{Client: &rest.Config{}, Namespace: "n", Prefix: "p", Replica: "r", Kinds: []string{"k"}}
	if _, err := lease.New(good); err != nil {
		t.Error(err)
	}
	for what, change := range map[string]func(*lease.Config){
		"no client": func(c *lease.Config) { c.Client = nil }, "no namespace": func(c *lease.Config) { c.Namespace = "" },
		"no replica": func(c *lease.Config) { c.Replica = "" }, "no kinds": func(c *lease.Config) { c.Kinds = nil },
		"a kind that is no name": func(c *lease.Config) { c.Kinds = []string{"A B"} }, "a kind that is a role": func(c *lease.Config) { c.Kinds = []string{"plan"} },
		"a prefix that is no label": func(c *lease.Config) { c.Prefix = "A/b" },
		"a lease of half a second": func(c *lease.Config) {
			c.Timing = nodemanager.Timing{Lease: 500 * time.Millisecond, RenewDeadline: 300 * time.Millisecond, RetryPeriod: 1}
		},
		"a lease of broken seconds":  func(c *lease.Config) { c.Timing.Lease = 15500 * time.Millisecond },
		"a deadline after the lease": func(c *lease.Config) { c.Timing.RenewDeadline = time.Minute },
	} {
		c := good
		change(&c)
		if _, err := lease.New(c); err == nil {
			t.Errorf("accepted: %s", what)
		}
	}
}

// idle is a node that does nothing for its shards.
type idle struct{}

func (idle) Run(ctx context.Context) error                                 { <-ctx.Done(); return nil }
func (idle) UpdateShardRange(context.Context, descriptor.ShardRange) error { return nil }

type known struct{}

func (known) WaitSynced(context.Context) error { return nil }

// proc is a process with a manager.
type proc struct {
	*nodemanager.Manager
	name  string
	stop  context.CancelFunc
	ended chan struct{}
}

func (p *place) start(t *testing.T, name string) *proc {
	t.Helper()
	kinds := []nodemanager.Kind{}
	for _, k := range []string{membershiptest.Kind, "other"} {
		kinds = append(kinds, nodemanager.Kind{Name: k, Nodes: 2, New: func(string) (nodemanager.Node, error) { return idle{}, nil }})
	}
	m, err := nodemanager.New(nodemanager.Config{
		Topology: known{}, Ring: 64, Version: "v1", Kinds: kinds, Membership: p.Member(name), Settle: timing.RetryPeriod, CheckEvery: time.Second,
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	x := &proc{Manager: m, name: name, stop: cancel, ended: make(chan struct{})}
	go func() {
		defer close(x.ended)
		if err := m.Run(ctx); err != nil {
			t.Errorf("%s ended with %v", name, err)
		}
	}()
	t.Cleanup(func() { x.end() })
	return x
}

func (x *proc) end() {
	x.stop()
	<-x.ended
}

// covered waits until all of procs agree that they serve every shard, each its part.
func covered(t *testing.T, procs ...*proc) time.Duration {
	t.Helper()
	began := time.Now()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := isCovered(procs)
		if err == nil {
			return time.Since(began)
		}
		if time.Since(began) > 30*time.Second {
			t.Fatalf("not covered: %v", err)
		}
		<-tick.C
	}
}

func isCovered(procs []*proc) error {
	for _, x := range procs {
		s := x.Status()
		for _, k := range s.Kinds {
			nodes := 0
			for _, m := range k.Members {
				for _, n := range m.Nodes {
					if m.Alive {
						nodes++
					}
					if m.Alive && (n.Held != n.Granted || n.Held != n.Target || n.Held.From >= n.Held.To) {
						return fmt.Errorf("%s: %s holds %s, is granted %s of %s", x.name, n.ID, n.Held, n.Granted, n.Target)
					}
				}
			}
			if k.Unowned > 0 || len(k.Draining) > 0 || nodes != 2*len(procs) || k.Leader == "" {
				return fmt.Errorf("%s: %d unowned, %d nodes, draining %v, leader %s", x.name, k.Unowned, nodes, k.Draining, k.Leader)
			}
		}
		if len(s.Kinds) != 2 {
			return fmt.Errorf("%s is no member", x.name)
		}
	}
	return nil
}

func (p *place) leases(t *testing.T) coordinationclient.LeaseInterface {
	t.Helper()
	c, err := kubernetes.NewForConfig(cluster.Config)
	if err != nil {
		t.Fatal(err)
	}
	return c.CoordinationV1().Leases("default")
}

func (p *place) all() metav1.ListOptions {
	return metav1.ListOptions{LabelSelector: "meta.dbcontroller.io/ring=" + p.prefix}
}

func TestScaledAndKilled(t *testing.T) { // P13
	p := newPlace(t)
	a := p.start(t, "a")
	t.Logf("one: %s", covered(t, a))
	b, c := p.start(t, "b"), p.start(t, "c")
	t.Logf("three: %s", covered(t, a, b, c))
	b.end()
	t.Logf("one has left: %s", covered(t, a, c))
	p.Cut("a", true) // the leader, most likely
	a.stop()
	took := covered(t, c)
	t.Logf("one was killed: %s", took)
	if most := timing.Lease*3/2 + 2*time.Second; took > most {
		t.Errorf("covered after %s, want %s", took, most)
	}
	<-a.ended
	c.end()
	// Who ends takes its Leases along; who was killed does not.
	l, err := p.leases(t).List(t.Context(), p.all())
	if err != nil {
		t.Fatal(err)
	}
	left := map[string]int{}
	for _, l := range l.Items {
		left[l.Labels["meta.dbcontroller.io/lease"]]++
	}
	if left["member"] != 2 || left["plan"] != 2 || left["leader"] != 1 {
		t.Errorf("left behind: %v", left)
	}
}

func TestLeasesChangedByHand(t *testing.T) { // O4
	p := newPlace(t)
	a, b := p.start(t, "a"), p.start(t, "b")
	covered(t, a, b)
	before := a.Status()
	leases := p.leases(t)
	versions := func() (all []int64) {
		for _, k := range a.Status().Kinds {
			all = append(all, k.PlanVersion)
		}
		return all
	}
	was := versions()

	if err := leases.DeleteCollection(t.Context(), metav1.DeleteOptions{}, p.all()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the plans are there again, and newer", func() bool { now := versions(); return now[0] > was[0] && now[1] > was[1] })
	covered(t, a, b)
	if a.Status().Member != before.Member {
		t.Errorf("%s is %s now", before.Member, a.Status().Member)
	}

	edit(t, leases, p.prefix+"-work-a", func(l *coordinationv1.Lease) { l.Annotations, l.Labels = nil, nil })
	edit(t, leases, p.prefix+"-plan-work", func(l *coordinationv1.Lease) { l.Annotations["meta.dbcontroller.io/plan"] = "{oops" })
	eventually(t, "the edited plan is replaced", func() bool { return versions()[0] > was[0]+1 })
	covered(t, a, b)
	edit(t, leases, p.prefix+"-plan-work", func(l *coordinationv1.Lease) { l.Labels = nil })
	eventually(t, "the plan is to be seen again", func() bool {
		l, err := leases.Get(t.Context(), p.prefix+"-plan-work", metav1.GetOptions{})
		return err == nil && l.Labels["meta.dbcontroller.io/ring"] == p.prefix
	})
	covered(t, a, b)

	// Another holder is another process: this one steps back, and takes the name when the other does not renew.
	edit(t, leases, p.prefix+"-work-a", func(l *coordinationv1.Lease) { other := "other"; l.Spec.HolderIdentity = &other })
	eventually(t, "it is another member", func() bool { id := a.Status().Member; return id != "" && id != before.Member })
	covered(t, a, b)
}

func edit(t *testing.T, leases coordinationclient.LeaseInterface, name string, change func(*coordinationv1.Lease)) {
	t.Helper()
	eventually(t, "edit "+name, func() bool {
		l, err := leases.Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return false
		}
		change(l)
		_, err = leases.Update(t.Context(), l, metav1.UpdateOptions{})
		return err == nil
	})
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(30 * time.Second); !ok(); {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not: %s", what)
		}
	}
}

// TestStartedAgainUnderItsName: a container that was killed is started again in its pod, so under the same name. It waits until what was killed is dead, and no longer: not once for each
// kind of nodes, nor for the election.
func TestStartedAgainUnderItsName(t *testing.T) { // P13
	p := newPlace(t)
	a := p.start(t, "a")
	covered(t, a)
	p.Cut("a", true)
	a.end()
	p.Cut("a", false)
	took := covered(t, p.start(t, "a"))
	t.Logf("covered after %s", took)
	if most := timing.Lease*3/2 + 2*time.Second; took > most {
		t.Errorf("covered after %s, want %s", took, most)
	}
}

// TestSecondOfAName: two processes of one name are one after the other.
func TestSecondOfAName(t *testing.T) {
	p := newPlace(t)
	a := p.start(t, "a")
	covered(t, a)
	second := p.start(t, "a")
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(2 * timing.Lease); time.Now().Before(end); <-tick.C {
		if second.Status().Member != "" {
			t.Fatal("both are a")
		}
	}
	if err := isCovered([]*proc{a}); err != nil {
		t.Error(err)
	}
	a.end()
	covered(t, second)
}
