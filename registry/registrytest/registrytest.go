// Package registrytest holds the behaviour that every source of a registry must have: one suite, run against each.
package registrytest

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	. "github.com/onsi/ginkgo/v2" //nolint:staticcheck // the language of specs, as in _test files
	. "github.com/onsi/gomega"    //nolint:staticcheck // the same
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/registry"
)

// Object is a *v1alpha1.Deployment, a *v1alpha1.ServiceDescriptor or a *corev1.Secret.
type Object interface {
	metav1.Object
	runtime.Object
}

// Source is a source under test, with a place of its own for its objects. Its methods fail the spec when they cannot do their part.
type Source interface {
	// Put creates the object or replaces its spec.
	Put(ctx context.Context, object Object)
	// PutRefused does as Put, but the source must refuse the object with a message that contains the text.
	PutRefused(ctx context.Context, object Object, text string)
	// Touch changes something of the object that means nothing.
	Touch(ctx context.Context, object Object)
	// Delete removes the object.
	Delete(ctx context.Context, object Object)
	// Start feeds a registry until the function that it returns has returned, or the spec ends.
	Start(ctx context.Context) (reg *registry.Registry, secrets registry.Secrets, stop func())
	// Namespace is where the objects live.
	Namespace() string
}

// Patience is how long a spec waits for what must happen.
const Patience = 20 * time.Second

// Service is the service of the suite's objects.
const Service = "packages.example.com"

// Behaves adds the suite for a kind of source; open is called in each spec.
func Behaves(kind string, open func(ctx context.Context) Source) bool {
	return Describe("a registry fed by "+kind, func() {
		var (
			source Source
			reg    *registry.Registry
			events <-chan registry.Event
		)
		start := func(ctx context.Context) {
			reg, _, _ = source.Start(ctx)
			events = Subscribe(reg)
		}
		BeforeEach(func(ctx context.Context) { source = open(ctx) })

		It("is synced when there is nothing at all", func(ctx context.Context) {
			start(ctx)
			synced := receive[registry.SyncEvent](events)
			Expect(synced.View.Deployments()).To(BeEmpty())
			Expect(synced.View.Services()).To(BeEmpty())
			Expect(reg.WaitSynced(ctx)).To(Succeed())
		})

		It("starts with everything that is there", func(ctx context.Context) {
			source.Put(ctx, Descriptor(source, "packages"))
			source.Put(ctx, Deployment(source, "eu", "eu"))
			source.Put(ctx, Deployment(source, "us", "us"))
			start(ctx)
			view := receive[registry.SyncEvent](events).View
			Expect(view.DeploymentsOf(Service)).To(HaveLen(2))
			eu, ok := view.Deployment(registry.Key{Service: Service, Region: "eu"})
			Expect(ok).To(BeTrue())
			Expect(eu).To(Equal(registry.Deployment{
				Key: registry.Key{Service: Service, Region: "eu"}, Namespace: source.Namespace(), Name: "eu", Endpoint: "https://eu.example.com:8443",
				Version: "v1", Ring: 4096, TrustDomain: "db-controller", LagObjective: 5 * time.Second,
				Database: registry.SecretRef{Namespace: source.Namespace(), Name: "eu-db", Key: "dsn"},
			}), "with the defaults of the CRD")
			service, ok := view.Service(Service)
			Expect(ok).To(BeTrue())
			Expect(service.Version("v1").Type("Package")).NotTo(BeNil())
			Expect(reg.View()).To(BeIdenticalTo(view))
		})

		It("tells of each change once, with the previous state", func(ctx context.Context) {
			start(ctx)
			receive[registry.SyncEvent](events)

			By("adding a service and a Deployment")
			source.Put(ctx, Descriptor(source, "packages"))
			Expect(receive[registry.ServiceSetEvent](events).Previous).To(BeNil())
			eu := Deployment(source, "eu", "eu")
			source.Put(ctx, eu)
			added := receive[registry.DeploymentSetEvent](events)
			Expect(added.Previous).To(BeNil())
			Expect(added.Deployment.Region).To(Equal("eu"))

			By("changing nothing that matters")
			source.Touch(ctx, eu)

			By("changing the Deployment")
			eu.Spec.Endpoint = "https://other.example.com"
			eu.Spec.SuspendScopes = []v1alpha1.SuspendScope{{PeerRegion: "us"}}
			source.Put(ctx, eu)
			changed := receive[registry.DeploymentSetEvent](events)
			Expect(changed.Deployment.Endpoint).To(Equal("https://other.example.com"))
			Expect(changed.Deployment.Suspends("us")).To(BeTrue())
			Expect(changed.Deployment.Suspends("ap")).To(BeFalse())
			Expect(changed.Previous).To(HaveValue(Equal(added.Deployment)))

			By("changing the service")
			descriptor := Descriptor(source, "packages")
			descriptor.Spec.Versions[0].Resources = append(descriptor.Spec.Versions[0].Resources, maintainers)
			source.Put(ctx, descriptor)
			set := receive[registry.ServiceSetEvent](events)
			Expect(set.Service.Version("v1").Type("Maintainer")).NotTo(BeNil())
			Expect(set.Previous.Version("v1").Type("Maintainer")).To(BeNil(), "a view that someone holds never changes")

			By("removing both")
			source.Delete(ctx, eu)
			Expect(receive[registry.DeploymentRemovedEvent](events).Previous).To(Equal(changed.Deployment))
			source.Delete(ctx, descriptor)
			Expect(receive[registry.ServiceRemovedEvent](events).Previous).To(BeIdenticalTo(set.Service))
			Consistently(events, "300ms").ShouldNot(Receive())
		})

		It("keeps to the older of two objects that declare the same, and reports the other", func(ctx context.Context) {
			source.Put(ctx, Descriptor(source, "a-packages"))
			source.Put(ctx, Deployment(source, "a-eu", "eu"))
			start(ctx)
			receive[registry.SyncEvent](events)
			rival := Deployment(source, "b-eu", "eu")
			rival.Spec.Endpoint = "https://rival.example.com"
			source.Put(ctx, rival)
			source.Put(ctx, Descriptor(source, "b-packages"))

			Eventually(reg.Problems, Patience).Should(ConsistOf(
				And(HaveField("Reason", registry.Conflict), HaveField("Object.Name", "b-eu"),
					HaveField("Message", ContainSubstring("already declared by Deployment "+source.Namespace()+"/a-eu"))),
				And(HaveField("Reason", registry.Conflict), HaveField("Object.Name", "b-packages")),
			))
			Expect(endpoint(reg, "eu")).To(Equal("https://eu.example.com:8443"))
			Expect(events).NotTo(Receive())

			By("removing the older one")
			source.Delete(ctx, Deployment(source, "a-eu", "eu"))
			succeeded := receive[registry.DeploymentSetEvent](events)
			Expect(succeeded.Deployment.Name).To(Equal("b-eu"))
			Expect(succeeded.Previous).To(HaveField("Name", "a-eu"))
			source.Delete(ctx, Descriptor(source, "a-packages"))
			Eventually(reg.Problems, Patience).Should(BeEmpty())
			Expect(events).NotTo(Receive(), "the other descriptor says the same")
		})

		It("keeps the last good state of a descriptor that does not compile", func(ctx context.Context) {
			source.Put(ctx, Descriptor(source, "packages"))
			start(ctx)
			receive[registry.SyncEvent](events)
			bad := Descriptor(source, "packages")
			bad.Spec.Versions[0].Resources[1].Patterns = []string{"sections/{section}/packages/{pack"}
			source.Put(ctx, bad)
			Eventually(reg.Problems, Patience).Should(ConsistOf(And(
				HaveField("Reason", registry.InvalidDescriptor), HaveField("Message", ContainSubstring("spec.versions[0].resources[1].patterns")))))
			Expect(events).NotTo(Receive())
			_, ok := reg.View().Service(Service)
			Expect(ok).To(BeTrue())

			source.Put(ctx, Descriptor(source, "packages"))
			Eventually(reg.Problems, Patience).Should(BeEmpty())
			Expect(events).NotTo(Receive(), "the cured descriptor is the one that was in force all the time")
		})

		It("refuses what the CRDs refuse, and keeps the last good state", func(ctx context.Context) {
			eu := Deployment(source, "eu", "eu")
			source.Put(ctx, eu)
			start(ctx)
			receive[registry.SyncEvent](events)

			moved := eu.DeepCopy()
			moved.Spec.Region = "us"
			source.PutRefused(ctx, moved, "the region of a Deployment cannot change")
			resharded := eu.DeepCopy()
			resharded.Spec.Shards = 64
			source.PutRefused(ctx, resharded, "shards cannot change")
			misaddressed := eu.DeepCopy()
			misaddressed.Spec.Endpoint = "eu.example.com"
			source.PutRefused(ctx, misaddressed, "endpoint must be an http or https URL")
			Expect(events).NotTo(Receive())
			Expect(endpoint(reg, "eu")).To(Equal("https://eu.example.com:8443"))

			eu.Spec.Endpoint = "https://mended.example.com"
			source.Put(ctx, eu)
			Expect(receive[registry.DeploymentSetEvent](events).Deployment.Endpoint).To(Equal("https://mended.example.com"))
		})

		It("does not let a newcomer change the ring of its service", func(ctx context.Context) {
			source.Put(ctx, Deployment(source, "m-eu", "eu"))
			start(ctx)
			receive[registry.SyncEvent](events)
			us := Deployment(source, "a-us", "us")
			us.Spec.Shards = 64
			source.Put(ctx, us)
			Eventually(reg.Problems, Patience).Should(ConsistOf(And(
				HaveField("Reason", registry.InvalidDeployment), HaveField("Object.Name", "a-us"), HaveField("Message", ContainSubstring("spec.shards: 64")))))
			Expect(events).NotTo(Receive())
		})

		It("knows the same after a restart", func(ctx context.Context) {
			source.Put(ctx, Descriptor(source, "packages"))
			for _, region := range []string{"ap", "eu", "us"} {
				source.Put(ctx, Deployment(source, region, region))
			}
			first, _, stop := source.Start(ctx)
			Expect(first.WaitSynced(ctx)).To(Succeed())
			stop()
			source.Delete(ctx, Deployment(source, "ap", "ap"))
			second, _, _ := source.Start(ctx)
			Expect(second.WaitSynced(ctx)).To(Succeed())
			Expect(second.View().Deployments()).To(Equal(first.View().Deployments()[1:]))
			Expect(second.View().Services()).To(HaveLen(1))
		})

		It("does not wait for a subscriber that is slow", func(ctx context.Context) {
			start(ctx)
			receive[registry.SyncEvent](events)
			slow := make(chan registry.Event) // taken from at the end only
			sub, cancel := context.WithCancel(context.Background())
			DeferCleanup(cancel)
			go func() {
				for e := range reg.Subscribe(sub) {
					select {
					case slow <- e:
					case <-sub.Done():
						return
					}
				}
			}()
			eu := Deployment(source, "eu", "eu")
			for i := range 5 {
				eu.Spec.Endpoint = fmt.Sprintf("https://eu-%d.example.com", i)
				source.Put(ctx, eu)
				Expect(receive[registry.DeploymentSetEvent](events).Deployment.Endpoint).To(Equal(eu.Spec.Endpoint))
			}
			receive[registry.SyncEvent](slow)
			Expect(receive[registry.DeploymentSetEvent](slow).Deployment.Endpoint).To(Equal("https://eu-4.example.com"), "merged to the latest state")
		})
	})
}

// Subscribe returns a registry's events until the spec ends.
func Subscribe(reg *registry.Registry) <-chan registry.Event {
	GinkgoHelper()
	events := make(chan registry.Event, 1000)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for e := range reg.Subscribe(ctx) {
			events <- e
		}
	}()
	DeferCleanup(func() { cancel(); <-done })
	return events
}

// receive returns the next event, which must be of type E.
func receive[E registry.Event](events <-chan registry.Event) E {
	GinkgoHelper()
	var e registry.Event
	Eventually(events, Patience).Should(Receive(&e))
	Expect(e).To(BeAssignableToTypeOf(*new(E)))
	return e.(E)
}

func endpoint(reg *registry.Registry, region string) string {
	d, _ := reg.View().Deployment(registry.Key{Service: Service, Region: region})
	return d.Endpoint
}

// Deployment returns a valid Deployment of the suite's service.
func Deployment(s Source, name, region string) *v1alpha1.Deployment {
	return &v1alpha1.Deployment{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: "Deployment"},
		ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace(), Name: name},
		Spec: v1alpha1.DeploymentSpec{
			Service: Service, Region: region, Version: "v1", Endpoint: "https://" + region + ".example.com:8443",
			Database: &v1alpha1.DatabaseSpec{SecretRef: v1alpha1.SecretKeyRef{Name: region + "-db"}},
		},
	}
}

var maintainers = v1alpha1.ResourceType{Type: "Maintainer", Plural: "maintainers", Patterns: []string{"maintainers/{maintainer}"}}

// Descriptor returns a valid descriptor of the suite's service.
func Descriptor(s Source, name string) *v1alpha1.ServiceDescriptor {
	schema, err := json.Marshal(map[string]any{"type": "object", "properties": map[string]any{"version": map[string]any{"type": "string"}}})
	Expect(err).NotTo(HaveOccurred())
	return &v1alpha1.ServiceDescriptor{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: "ServiceDescriptor"},
		ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace(), Name: name},
		Spec: v1alpha1.ServiceDescriptorSpec{
			Service:           Service,
			MultiRegionPolicy: &v1alpha1.MultiRegionPolicy{EnabledRegions: []string{"eu", "us"}, DefaultControlRegion: "eu"},
			Versions: []v1alpha1.ServiceVersion{{Name: "v1", Resources: []v1alpha1.ResourceType{
				{Type: "Section", Plural: "sections", Patterns: []string{"sections/{section}"}},
				{Type: "Package", Plural: "packages", Patterns: []string{"sections/{section}/packages/{package}"}, Parent: "Section",
					OnParentDeleted: v1alpha1.DeleteCascade, Schema: &runtime.RawExtension{Raw: schema}},
			}}},
		},
	}
}
