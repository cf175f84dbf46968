package deployment_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

// office is a region of a service with a registry of its own, as each has its own cluster.
type office struct {
	region, dsn string
	g           *WithT
	registry    *registry.Registry
	listener    net.Listener
	*deployment.Deployment
	end func()
}

// listen takes the address of the office, the same one as before if it had one.
func (o *office) listen() {
	var err error
	if o.listener == nil {
		o.listener, err = net.Listen("tcp", "127.0.0.1:0")
	} else {
		o.listener, err = net.Listen("tcp", o.listener.Addr().String())
	}
	o.g.Expect(err).NotTo(HaveOccurred())
}

// run opens its Deployment and runs it until end.
func (o *office) run() {
	d, err := deployment.Open(context.Background(), deployment.Config{Key: registry.Key{Service: "offices.example.com", Region: o.region}, Registry: o.registry, DSN: o.dsn,
		MaxConns: 8, PolicyRate: -1, Logger: slog.New(slog.DiscardHandler)})
	o.g.Expect(err).NotTo(HaveOccurred())
	serve, err := d.Server(o.listener)
	o.g.Expect(err).NotTo(HaveOccurred())
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx, serve, d.Manage) }()
	o.Deployment, o.end = d, func() {
		cancel()
		o.g.Expect(<-ended).To(Succeed())
		d.Close()
	}
}

func (o *office) write(op store.Op, name string) error {
	_, err := store.Apply(context.Background(), o.Store(), store.Write{Op: op, Name: name, Body: []byte(`{}`)})
	return err
}

func (o *office) has(name string) func() bool {
	return func() bool {
		_, err := o.Store().Get(context.Background(), name)
		return err == nil
	}
}

// held is the metric that says that a policy is held back.
func (o *office) held() float64 {
	families, err := o.Metrics().Gather()
	o.g.Expect(err).NotTo(HaveOccurred())
	for _, f := range families {
		if f.GetName() == "dbcontroller_policy_held" {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	return -1
}

// TestPolicyOfAServiceIsRefused: a region takes the policy of a ServiceDescriptor only if no region would own what nobody may own then (F33, F36, I42, spec 4.9). The former one stays in
// force everywhere, also across restarts, and the reason is said; when what was in the way is gone, it comes into force by itself.
func TestPolicyOfAServiceIsRefused(t *testing.T) {
	g := NewWithT(t)
	g.SetDefaultEventuallyTimeout(60 * time.Second)
	offices := map[string]*office{}
	for _, region := range []string{"ap", "eu", "us"} {
		o := &office{region: region, dsn: pgtest.Database(t), g: g, registry: registry.New()}
		o.listen()
		offices[region] = o
	}
	ap, eu, us := offices["ap"], offices["eu"], offices["us"]
	declare := func(p *v1alpha1.MultiRegionPolicy, to ...*office) {
		s := &v1alpha1.ServiceDescriptor{Spec: v1alpha1.ServiceDescriptorSpec{Service: "offices.example.com", MultiRegionPolicy: p, Versions: []v1alpha1.ServiceVersion{{Name: "v1",
			Resources: []v1alpha1.ResourceType{{Type: "Note", Plural: "notes", Patterns: []string{"notes/{note}"}},
				{Type: "Office", Plural: "offices", Patterns: []string{"regions/{region}/offices/{office}"}}}}}}}
		s.Name = "offices"
		snapshot := registry.Snapshot{Services: []*v1alpha1.ServiceDescriptor{s}}
		for region, o := range offices {
			d := &v1alpha1.Deployment{Spec: v1alpha1.DeploymentSpec{Service: "offices.example.com", Region: region, Version: "v1", Endpoint: "http://" + o.listener.Addr().String()}}
			d.Name = region
			snapshot.Deployments = append(snapshot.Deployments, d)
		}
		for _, o := range to {
			g.Expect(o.registry.Apply(snapshot)).To(BeEmpty())
		}
	}
	policy := func(control string, regions ...string) *v1alpha1.MultiRegionPolicy {
		return &v1alpha1.MultiRegionPolicy{EnabledRegions: regions, DefaultControlRegion: control}
	}
	inForce := func(o *office) func() string {
		return func() string {
			return fmt.Sprintf("%v %s", o.ServicePolicy().EnabledRegions(), o.ServicePolicy().DefaultControlRegion())
		}
	}

	declare(policy("eu", "ap", "eu", "us"), ap, eu, us)
	for _, o := range offices {
		o.run()
	}
	t.Cleanup(func() {
		for _, o := range offices {
			o.end()
		}
	})
	g.Expect(eu.write(store.Create, "notes/n")).To(Succeed())
	g.Expect(us.write(store.Create, "regions/us/offices/a")).To(Succeed())
	g.Eventually(us.has("notes/n")).Should(BeTrue())
	g.Eventually(ap.has("regions/us/offices/a")).Should(BeTrue())

	// us owns an office: it cannot be taken out, and nobody acts as if it were.
	declare(policy("eu", "ap", "eu"), ap, eu, us)
	for _, o := range offices {
		g.Eventually(o.PolicyHeld).Should(ConsistOf("region us, which it does not enable any more, still owns 1 resources (1 Office): delete them first, or keep the region enabled"))
		g.Expect(inForce(o)()).To(Equal("[ap eu us] eu"))
	}
	g.Expect(us.held()).To(Equal(1.0))
	g.Expect(us.write(store.Create, "regions/us/offices/b")).To(Succeed(), "the former policy is in force, in all it says")
	g.Expect(eu.write(store.Create, "notes/m")).To(Succeed())
	g.Eventually(us.has("notes/m")).Should(BeTrue())
	g.Eventually(us.PolicyHeld).Should(ConsistOf(ContainSubstring("(2 Office)")))
	eu.end()
	eu.listen()
	eu.run()
	g.Expect(inForce(eu)()).To(Equal("[ap eu us] eu"), "a restart does not forget it")
	g.Eventually(eu.PolicyHeld).Should(ConsistOf(ContainSubstring("(2 Office)")))
	g.Expect(eu.Status().PolicyHeld).NotTo(BeEmpty())

	jp := &office{region: "jp", dsn: pgtest.Database(t), g: g, registry: registry.New()}
	jp.listen()
	offices["jp"] = jp
	declare(policy("eu", "ap", "eu"), ap, eu, us, jp)
	jp.run()
	g.Expect(inForce(jp)()).To(Equal("[ap eu us] eu"), "a region that is added meanwhile follows the others")

	for _, name := range []string{"regions/us/offices/a", "regions/us/offices/b"} {
		g.Expect(us.write(store.Delete, name)).To(Succeed())
	}
	for _, o := range offices {
		g.Eventually(inForce(o)).Should(Equal("[ap eu] eu"))
		g.Eventually(o.PolicyHeld).Should(BeEmpty())
		g.Expect(o.held()).To(BeZero())
	}
	g.Eventually(us.has("notes/n")).Should(BeFalse(), "it is carried out")
	g.Expect(us.write(store.Create, "regions/us/offices/c")).To(MatchError(ContainSubstring("enabledRegions")))

	// eu would lose the control of notes. A region that has not heard of that, or cannot be asked, could go on to create what it may not own.
	for _, name := range []string{"notes/n", "notes/m"} {
		g.Expect(eu.write(store.Delete, name)).To(Succeed())
	}
	declare(policy("ap", "ap", "eu"), ap)
	g.Eventually(ap.PolicyHeld).Should(ConsistOf(ContainSubstring("region eu, from which it takes something, has not been given this policy: apply the ServiceDescriptor there, too")))
	eu.end()
	g.Eventually(ap.PolicyHeld).Should(ConsistOf(ContainSubstring("region eu must say whether it owns resources that this policy takes from it, and cannot be asked")))
	g.Expect(ap.write(store.Create, "notes/x")).To(MatchError(ContainSubstring("owned by region eu")))
	g.Expect(inForce(ap)()).To(Equal("[ap eu] eu"))
	declare(policy("ap", "ap", "eu"), eu)
	eu.listen()
	eu.run()
	for _, o := range []*office{ap, eu} {
		g.Eventually(inForce(o), "90s").Should(Equal("[ap eu] ap"))
	}
	g.Expect(inForce(us)()).To(Equal("[ap eu] eu"), "it has not been given it")
	g.Expect(ap.write(store.Create, "notes/x")).To(Succeed())

	// A policy that is taken back is not held any more.
	declare(policy("eu", "ap", "eu"), ap)
	g.Eventually(ap.PolicyHeld).Should(ConsistOf(ContainSubstring("region ap still owns 1 resources without a region in their names (1 Note), which would belong to eu")))
	declare(policy("ap", "ap", "eu"), ap)
	g.Eventually(ap.PolicyHeld).Should(BeEmpty())
	g.Expect(inForce(ap)()).To(Equal("[ap eu] ap"))
}
