package controllers_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/controllers"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/registry/registrytest"
)

// cleaner stands for the databases.
type cleaner struct {
	mu        sync.Mutex
	referrers []string
	refersErr error
	dropErr   error
	marks     []string // that Drop was called with
	dropped   []registry.Key
	leaving   []registry.Key // at the last look
}

func (c *cleaner) Referrers(_ context.Context, _ registry.Deployment, leaving []registry.Key) ([]string, string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leaving = leaving
	return c.referrers, "mark", c.refersErr
}

func (c *cleaner) Drop(_ context.Context, d registry.Deployment, mark string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.marks = append(c.marks, mark)
	if c.dropErr == nil {
		c.dropped = append(c.dropped, d.Key)
	}
	return c.dropErr
}

func (c *cleaner) set(change func(*cleaner)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(c)
}

func (c *cleaner) all() []registry.Key {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.dropped)
}

var _ = Describe("the deletion of a Deployment", func() {
	var (
		n   *namespace
		eu  *v1alpha1.Deployment
		key = registry.Key{Service: registrytest.Service, Region: "eu"}
	)
	BeforeEach(func(ctx context.Context) {
		n = newNamespace(ctx)
		n.cleaner = &cleaner{}
		eu = registrytest.Deployment(n, "eu", "eu")
		eu.Spec.ReclaimPolicy = v1alpha1.ReclaimDelete
	})
	cleanupForged := metav1.Condition{Type: v1alpha1.ConditionCleanupBlocked, Status: metav1.ConditionTrue, Reason: "Forged", LastTransitionTime: metav1.Now()}
	get := func(ctx context.Context, name string) *v1alpha1.Deployment {
		var d v1alpha1.Deployment
		err := admin.Get(ctx, client.ObjectKey{Namespace: n.name, Name: name}, &d)
		if apierrors.IsNotFound(err) {
			return nil
		}
		Expect(err).NotTo(HaveOccurred())
		return &d
	}
	finalizers := func(ctx context.Context, name string) func() []string {
		return func() []string {
			if d := get(ctx, name); d != nil {
				return d.Finalizers
			}
			return nil
		}
	}
	gone := func(ctx context.Context, name string) {
		GinkgoHelper()
		Eventually(func() *v1alpha1.Deployment { return get(ctx, name) }, registrytest.Patience).Should(BeNil())
	}
	blocked := func(ctx context.Context, name string) func() string {
		return func() string {
			if d := get(ctx, name); d != nil {
				if c := meta.FindStatusCondition(d.Status.Conditions, v1alpha1.ConditionCleanupBlocked); c != nil {
					return c.Reason + ": " + c.Message
				}
			}
			return ""
		}
	}
	annotate := func(ctx context.Context, name, annotation, value string) {
		GinkgoHelper()
		Expect(admin.Patch(ctx, get(ctx, name), client.RawPatch("application/merge-patch+json",
			[]byte(`{"metadata":{"annotations":{"`+annotation+`":"`+value+`"}}}`)))).To(Succeed())
	}
	kept := func(ctx context.Context, name string) {
		GinkgoHelper()
		Eventually(finalizers(ctx, name), registrytest.Patience).Should(ConsistOf(v1alpha1.CleanupFinalizer))
	}

	It("with Retain touches nothing and waits for nobody", func(ctx context.Context) {
		eu.Spec.ReclaimPolicy = v1alpha1.ReclaimRetain
		n.Put(ctx, eu)
		n.Start(ctx)
		Eventually(func() int64 { return get(ctx, "eu").Status.ObservedGeneration }, registrytest.Patience).Should(BeEquivalentTo(1))
		Expect(finalizers(ctx, "eu")()).To(BeEmpty())
		n.Delete(ctx, eu)
		Expect(get(ctx, "eu")).To(BeNil())
		Consistently(n.cleaner.all, "300ms").Should(BeEmpty())
	})

	It("with Delete drops the data, once no process serves it and what was looked at still holds", func(ctx context.Context) {
		n.Put(ctx, eu)
		reg, _, _ := n.Start(ctx)
		kept(ctx, "eu")
		n.cleaner.set(func(c *cleaner) { c.dropErr = controllers.ErrInUse })
		n.Delete(ctx, eu)
		Eventually(blocked(ctx, "eu"), registrytest.Patience).Should(HavePrefix("InUse: "))
		Eventually(func() bool { _, ok := reg.View().Deployment(key); return ok }, registrytest.Patience).Should(BeFalse(), "all processes must stop")
		Expect(get(ctx, "eu").Annotations).To(HaveKeyWithValue(v1alpha1.ClosingAnnotation, "mark"))

		By("a reference that came meanwhile: back into service, and once more")
		n.cleaner.set(func(c *cleaner) {
			c.dropErr = controllers.ErrReferred
			c.referrers = []string{"orders/1 in b.example.com/us"}
		})
		Eventually(blocked(ctx, "eu"), registrytest.Patience).Should(And(HavePrefix("Referenced: "), ContainSubstring("orders/1 in b.example.com/us"), ContainSubstring("force-delete")))
		Eventually(func() bool { _, ok := reg.View().Deployment(key); return ok }, registrytest.Patience).Should(BeTrue())
		Expect(n.cleaner.all()).To(BeEmpty())
		n.cleaner.set(func(c *cleaner) { c.dropErr, c.referrers = nil, nil })
		gone(ctx, "eu")
		Expect(n.cleaner.all()).To(ConsistOf(key))
		Expect(n.cleaner.marks).To(HaveEach("mark"))
		Eventually(n.happened(ctx), registrytest.Patience).Should(ContainElements("eu CleanupBlocked", "eu DataDropped"))
	})

	It("with Delete waits for references, without end, until they are forced aside", func(ctx context.Context) {
		n.cleanupWait = 1
		n.cleaner.referrers = []string{"orders/1 in b.example.com/us"}
		n.Put(ctx, eu)
		reg, _, _ := n.Start(ctx)
		kept(ctx, "eu")
		n.Delete(ctx, eu)
		Eventually(blocked(ctx, "eu"), registrytest.Patience).Should(ContainSubstring("orders/1 in b.example.com/us"))
		Consistently(func() bool { _, ok := reg.View().Deployment(key); return ok && get(ctx, "eu") != nil }, "500ms").Should(BeTrue(), "it goes on serving")
		annotate(ctx, "eu", v1alpha1.ForceDeleteAnnotation, "true")
		gone(ctx, "eu")
		Expect(n.cleaner.all()).To(ConsistOf(key))
		Expect(n.cleaner.marks).To(ConsistOf(""), "whatever refers to it")
	})

	It("with Delete does not wait for ever for a database that is gone (S13)", func(ctx context.Context) {
		n.cleanupWait = 1
		n.cleaner.refersErr = errors.New("connection refused")
		n.Put(ctx, eu)
		n.Start(ctx)
		kept(ctx, "eu")
		n.Delete(ctx, eu)
		gone(ctx, "eu")
		Expect(n.cleaner.all()).To(BeEmpty())
		Eventually(n.happened(ctx), registrytest.Patience).Should(ContainElement("eu CleanupAbandoned"))
	})

	It("can be turned into one that retains, before and while it waits", func(ctx context.Context) {
		n.cleaner.referrers = []string{"orders/1 in b.example.com/us"}
		n.Put(ctx, eu)
		n.Start(ctx)
		kept(ctx, "eu")
		retained := eu.DeepCopy()
		retained.Spec.ReclaimPolicy = v1alpha1.ReclaimRetain
		Expect(admin.Patch(ctx, retained, client.RawPatch("application/merge-patch+json", []byte(`{"spec":{"reclaimPolicy":"Retain"}}`)))).To(Succeed())
		Eventually(finalizers(ctx, "eu"), registrytest.Patience).Should(BeEmpty())
		Expect(admin.Patch(ctx, retained, client.RawPatch("application/merge-patch+json", []byte(`{"spec":{"reclaimPolicy":"Delete"}}`)))).To(Succeed())
		kept(ctx, "eu")
		n.Delete(ctx, eu)
		Eventually(blocked(ctx, "eu"), registrytest.Patience).Should(HavePrefix("Referenced"))
		Expect(admin.Patch(ctx, retained, client.RawPatch("application/merge-patch+json", []byte(`{"spec":{"reclaimPolicy":"Retain"}}`)))).To(Succeed())
		gone(ctx, "eu")
		Expect(n.cleaner.all()).To(BeEmpty())
	})

	It("drops nothing of what another object declares, and nothing of another region", func(ctx context.Context) {
		n.Put(ctx, eu)
		n.Start(ctx)
		kept(ctx, "eu")
		rival := registrytest.Deployment(n, "rival", "eu")
		rival.Spec.ReclaimPolicy = v1alpha1.ReclaimDelete
		n.Put(ctx, rival)
		us := registrytest.Deployment(n, "us", "us")
		us.Spec.ReclaimPolicy = v1alpha1.ReclaimDelete
		n.Put(ctx, us)
		Eventually(func() bool { return meta.IsStatusConditionTrue(get(ctx, "rival").Status.Conditions, "Conflict") }, registrytest.Patience).Should(BeTrue())

		By("the one that is refused has nothing to drop, and neither has the other region")
		Expect(finalizers(ctx, "rival")()).To(BeEmpty())
		n.Delete(ctx, us)
		Expect(get(ctx, "us")).To(BeNil())

		By("the other, while the rival is there, must leave everything to it")
		n.Delete(ctx, eu)
		gone(ctx, "eu")
		Expect(n.cleaner.all()).To(BeEmpty())
		Eventually(n.happened(ctx), registrytest.Patience).Should(ContainElement("eu DataRetained"))
		kept(ctx, "rival")
	})

	It("does not count the references of those that are being dropped, too", func(ctx context.Context) {
		us := registrytest.Deployment(n, "us", "us")
		us.Spec.ReclaimPolicy = v1alpha1.ReclaimDelete
		us.Finalizers = []string{v1alpha1.CleanupFinalizer} // that of the other region's controller
		n.Put(ctx, us)
		n.Put(ctx, eu)
		n.Start(ctx)
		kept(ctx, "eu")
		n.Delete(ctx, us)
		n.Delete(ctx, eu)
		gone(ctx, "eu")
		Expect(n.cleaner.leaving).To(ConsistOf(registry.Key{Service: registrytest.Service, Region: "us"}))
		Expect(finalizers(ctx, "us")()).To(ConsistOf(v1alpha1.CleanupFinalizer), "ours to leave alone")
		Expect(admin.Patch(ctx, us, client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"finalizers":null}}`)))).To(Succeed())
	})

	It("is not begun by a status, an annotation or an object of the past (P23, S13)", func(ctx context.Context) {
		eu.Annotations = map[string]string{v1alpha1.ClosingAnnotation: "forced", v1alpha1.ForceDeleteAnnotation: "true"}
		n.Put(ctx, eu)
		reg, _, _ := n.Start(ctx)
		kept(ctx, "eu")
		Eventually(func() error {
			d := get(ctx, "eu")
			meta.SetStatusCondition(&d.Status.Conditions, cleanupForged)
			return admin.Status().Update(ctx, d)
		}, registrytest.Patience).Should(Succeed())
		Eventually(func() bool {
			return meta.FindStatusCondition(get(ctx, "eu").Status.Conditions, v1alpha1.ConditionCleanupBlocked) == nil
		}, registrytest.Patience).Should(BeTrue(), "what people write into the status is replaced")
		_, served := reg.View().Deployment(key)
		Expect(served).To(BeTrue())
		Expect(n.cleaner.all()).To(BeEmpty())

		By("an event that shows the object as deleted, long after it was made anew")
		past := get(ctx, "eu")
		past.DeletionTimestamp = &past.CreationTimestamp
		past.UID = "of-another-time"
		Expect(n.replay(ctx, past)).To(Succeed())
		past.UID = get(ctx, "eu").UID
		Expect(n.replay(ctx, past)).To(Succeed())
		Expect(n.cleaner.marks).To(BeEmpty())
		Expect(strings.Join(finalizers(ctx, "eu")(), " ")).To(Equal(v1alpha1.CleanupFinalizer))
	})
})
