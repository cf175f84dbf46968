package controllers_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/verify"
)

// verifier stands for the copies: each slice of a pass reads ten of a hundred rows, and finds a difference in row 30.
type verifier struct {
	mu     sync.Mutex
	slices []string // peer, mode and where the slice began
	fail   error
}

func (v *verifier) began() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return append([]string(nil), v.slices...)
}

func (v *verifier) setFail(err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.fail = err
}

func (v *verifier) VerificationPeers(_, _ string) ([]string, error) { return []string{"ap", "us"}, nil }

func (v *verifier) Verify(_ context.Context, service, region, peer string, opt verify.Options, s verify.State, report func(verify.Progress) error) (verify.State, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.fail != nil {
		return s, v.fail
	}
	if peer == "mars" {
		return s, store.Errorf(store.InvalidArgument, "", "%q is no other region of %s in %s", peer, service, region)
	}
	v.slices = append(v.slices, fmt.Sprintf("%s %d %d", peer, opt.Mode, s.Done))
	s.Began, s.Total = time.Unix(1_700_000_000, 0), 100
	s.Done += 10
	s.Compared = s.Done
	s.Finished = s.Done == s.Total
	p := verify.Progress{ETA: time.Minute}
	if s.Done == 30 && peer == "us" {
		s.Differences = map[string]int64{"Book": 1}
		d := verify.Difference{Name: "shelves/a/books/30", Type: "Book", Kind: verify.Content}
		if opt.Mode == verify.Repair {
			s.Repaired = map[string]int64{"Book": 1}
			d.Action, d.Repaired = "write the owner's row over the copy", true
		}
		p.Found = []verify.Difference{d}
	}
	p.State = s
	return s, report(p)
}

var _ = Describe("a Verification", func() {
	var n *namespace
	BeforeEach(func(ctx context.Context) {
		n = newNamespace(ctx)
		n.verifier = &verifier{}
	})
	create := func(ctx context.Context, spec v1alpha1.VerificationSpec) func() v1alpha1.VerificationStatus {
		GinkgoHelper()
		v := &v1alpha1.Verification{ObjectMeta: metav1.ObjectMeta{GenerateName: "v-", Namespace: n.name}, Spec: spec}
		Expect(admin.Create(ctx, v)).To(Succeed())
		return func() v1alpha1.VerificationStatus {
			var now v1alpha1.Verification
			Expect(admin.Get(ctx, client.ObjectKeyFromObject(v), &now)).To(Succeed())
			return now.Status
		}
	}
	phase := func(s v1alpha1.VerificationStatus) v1alpha1.VerificationPhase { return s.Phase }
	reason := func(s v1alpha1.VerificationStatus) string {
		c := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionSucceeded)
		if c == nil {
			return ""
		}
		return string(c.Status) + " " + c.Reason
	}

	It("is carried out in slices, lists what it found and fails when differences are left", func(ctx context.Context) {
		_, _, stop := n.Start(ctx)
		status := create(ctx, v1alpha1.VerificationSpec{Service: "library.example.com", Region: "eu"})
		Eventually(status, "20s").Should(WithTransform(phase, Equal(v1alpha1.VerificationFailed)))
		s := status()
		Expect(reason(s)).To(Equal("False Differs"))
		Expect(s.Scope).To(Equal("eu<-ap,us"))
		Expect(s.Progress).To(Equal("100%"))
		Expect(s.Compared).To(Equal(int64(200)))
		Expect(s.Differences).To(Equal(int64(1)))
		Expect(s.VerifiedThrough).To(BeNil())
		Expect(s.RemainingTime).To(BeNil())
		Expect(s.Found).To(ConsistOf(v1alpha1.RowDifference{PeerRegion: "us", Name: "shelves/a/books/30", Type: "Book", Kind: "content"}))
		stop()
	})

	It("goes on after a restart where it was, and succeeds when it has repaired all", func(ctx context.Context) {
		_, _, stop := n.Start(ctx)
		n.verifier.setFail(errors.New("the owner is away"))
		status := create(ctx, v1alpha1.VerificationSpec{Service: "library.example.com", Region: "eu", PeerRegion: "us", Repair: v1alpha1.RepairRepair})
		Eventually(status, "20s").Should(WithTransform(reason, Equal("Unknown Retrying")))
		stop()
		n.verifier.setFail(nil)
		_, _, stop = n.Start(ctx)
		Eventually(status, "20s").Should(WithTransform(phase, Equal(v1alpha1.VerificationSucceeded)))
		s := status()
		Expect(reason(s)).To(Equal("True Repaired"))
		Expect(s.Repaired).To(Equal(int64(1)))
		Expect(s.VerifiedThrough.Unix()).To(Equal(int64(1_700_000_000)))
		began := n.verifier.began()
		Expect(began).To(HaveLen(10), "no slice was done twice: %v", began)
		Expect(began[3]).To(Equal("us 2 30"))
		stop()
	})

	It("fails at once when nothing can come of it, and is no business of other regions", func(ctx context.Context) {
		_, _, stop := n.Start(ctx)
		elsewhere := create(ctx, v1alpha1.VerificationSpec{Service: "library.example.com", Region: "us"})
		status := create(ctx, v1alpha1.VerificationSpec{Service: "library.example.com", Region: "eu", PeerRegion: "mars"})
		Eventually(status, "20s").Should(WithTransform(reason, Equal("False Invalid")))
		Expect(elsewhere().Phase).To(BeEmpty())
		stop()
	})

	It("cannot be changed", func(ctx context.Context) {
		v := &v1alpha1.Verification{ObjectMeta: metav1.ObjectMeta{Name: "v", Namespace: n.name}, Spec: v1alpha1.VerificationSpec{Service: "a.b", Region: "eu"}}
		Expect(admin.Create(ctx, v)).To(Succeed())
		Expect(v.Spec.Repair).To(Equal(v1alpha1.RepairNone))
		v.Spec.Repair = v1alpha1.RepairRepair
		Expect(admin.Update(ctx, v)).To(MatchError(ContainSubstring("make another one")))
	})
})
