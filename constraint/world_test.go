package constraint_test

import (
	"context"
	"fmt"
	"slices"
	"sync"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"sigs.k8s.io/yaml"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

// Two services: mid, whose layer is under test, imports low. The type Node has a field of each behavior.
const (
	lowService = "low.example.com"
	midService = "mid.example.com"

	lowSchema = `
service: low.example.com
multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}
versions:
- name: v1
  resources:
  - {type: Project, plural: projects, patterns: ["projects/{project}"], policyHolder: {field: policy}}
  - {type: Secret, plural: secrets, patterns: ["projects/{project}/secrets/{secret}"], parent: Project, onParentDeleted: CascadeDelete}
  - {type: Item, plural: items, patterns: ["items/{item}"]}
  - {type: Loose, plural: loose, patterns: ["loose/{loose}"], optOuts: {dbConstraints: true}}
- name: v2
  resources:
  - {type: Project, plural: projects, patterns: ["projects/{project}"], policyHolder: {field: policy}}
  - {type: Secret, plural: keys, patterns: ["projects/{project}/keys/{secret}"], parent: Project, onParentDeleted: CascadeDelete}
  - {type: Item, plural: things, patterns: ["things/{item}"]}
  - {type: Loose, plural: loose, patterns: ["loose/{loose}"], optOuts: {dbConstraints: true}}
`
	midSchema = `
service: mid.example.com
multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}
versions:
- name: v1
  imports: [{service: low.example.com, version: v1}]
  resources:
  - type: Node
    plural: nodes
    patterns: ["nodes/{node}"]
    references:
    - {field: block, target: Node, onTargetDeleted: Block}
    - {field: unset, target: Node, onTargetDeleted: Unset}
    - {field: "unsets[]", target: Node, onTargetDeleted: Unset}
    - {field: "parts[].node", target: Node, onTargetDeleted: Unset}
    - {field: cascade, target: Node, onTargetDeleted: CascadeDelete}
    - {field: "cascades[]", target: Node, onTargetDeleted: CascadeDelete}
    - {field: asyncUnset, target: Node, onTargetDeleted: AsyncUnset}
    - {field: asyncCascade, target: Node, onTargetDeleted: AsyncCascadeDelete}
    - {field: dangle, target: Node, onTargetDeleted: AllowDangling}
    - {field: site, target: Site, onTargetDeleted: Block}
    - {field: free, target: Free, onTargetDeleted: Block}
    - {field: "secrets[]", target: low.example.com/Secret, onTargetDeleted: Block}
    - {field: soft, target: low.example.com/Secret, onTargetDeleted: AsyncUnset}
    - {field: item, target: low.example.com/Item, onTargetDeleted: CascadeDelete}
    - {field: maybe, target: low.example.com/Item, onTargetDeleted: AllowDangling}
    - {field: loose, target: low.example.com/Loose, onTargetDeleted: Block}
  - {type: Child, plural: children, patterns: ["nodes/{node}/children/{child}"], parent: Node, onParentDeleted: CascadeDelete}
  - {type: Guard, plural: guards, patterns: ["nodes/{node}/guards/{guard}"], parent: Node, onParentDeleted: Block}
  - {type: Site, plural: sites, patterns: ["regions/{region}/sites/{site}"], references: [{field: near, target: Site, onTargetDeleted: Block}, {field: fellow, target: Site, onTargetDeleted: AsyncCascadeDelete}, {field: node, target: Node, onTargetDeleted: CascadeDelete}]}
  - {type: Spot, plural: spots, patterns: ["nodes/{node}/regions/{region}/spots/{spot}"], parent: Node, onParentDeleted: CascadeDelete}
  - {type: Slow, plural: slows, patterns: ["slows/{slow}"], asyncDeletion: true, references: [{field: block, target: Node, onTargetDeleted: Block}]}
  - {type: Free, plural: frees, patterns: ["frees/{free}"], optOuts: {dbConstraints: true}, references: [{field: block, target: Node, onTargetDeleted: Block}]}
`
)

var (
	midEU, midUS = store.Location{Service: midService, Region: "eu"}, store.Location{Service: midService, Region: "us"}
	lowEU, lowUS = store.Location{Service: lowService, Region: "eu"}, store.Location{Service: lowService, Region: "us"}
)

// topology declares both services at the given Deployments; low runs lowVersion.
func topology(lowVersion string, deployments ...store.Location) *registry.Registry {
	GinkgoHelper()
	var s registry.Snapshot
	for _, text := range []string{lowSchema, midSchema} {
		d := new(v1alpha1.ServiceDescriptor)
		Expect(yaml.UnmarshalStrict([]byte(text), &d.Spec)).To(Succeed())
		d.Name = d.Spec.Service
		s.Services = append(s.Services, d)
	}
	for _, l := range deployments {
		d := new(v1alpha1.Deployment)
		d.Name = l.Service + "." + l.Region
		d.Spec = v1alpha1.DeploymentSpec{Service: l.Service, Region: l.Region, Version: "v1", Endpoint: "http://127.0.0.1:1", Shards: 256}
		if l.Service == lowService {
			d.Spec.Version = lowVersion
		}
		s.Deployments = append(s.Deployments, d)
	}
	r := registry.New()
	Expect(r.Apply(s)).To(BeEmpty())
	return r
}

func versionOf(r *registry.Registry, service, version string) *descriptor.Version {
	s, ok := r.View().Service(service)
	if !ok {
		panic(service)
	}
	return s.Version(version)
}

// haveCode matches an error of package store.
func haveCode(code store.Code) OmegaMatcher { return WithTransform(store.CodeOf, Equal(code)) }

// fakeStore is the Store below the layer, and the core beside it: what it is told is kept in a list, and its answers are fields.
type fakeStore struct {
	rows    map[string]*store.Resource
	batches [][]store.Write
	errs    []error // of the writes to come
	onWrite func()

	reads    int // calls that are no writes
	outgoing map[string][]store.Reference
	closure  store.Closure
	suspects []store.Location
	begun    [][]string
}

func (f *fakeStore) Get(_ context.Context, name string) (*store.Resource, error) {
	f.reads++
	if r := f.rows[name]; r != nil {
		return r, nil
	}
	return nil, store.Errorf(store.NotFound, name, "does not exist")
}

func (f *fakeStore) BatchGet(_ context.Context, names []string) ([]*store.Resource, error) {
	f.reads++
	out := make([]*store.Resource, len(names))
	for i, n := range names {
		out[i] = f.rows[n]
	}
	return out, nil
}

func (f *fakeStore) List(context.Context, store.Query) (*store.Page, error) { panic("not used") }

func (f *fakeStore) BatchWrite(_ context.Context, writes []store.Write) ([]store.Result, error) {
	f.batches = append(f.batches, writes)
	if f.onWrite != nil {
		f.onWrite()
	}
	if len(f.errs) > 0 {
		err := f.errs[0]
		f.errs = f.errs[1:]
		if err != nil {
			return nil, err
		}
	}
	return make([]store.Result, len(writes)), nil
}

func (f *fakeStore) Outgoing(_ context.Context, names []string) (map[string][]store.Reference, store.Mark, error) {
	f.reads++
	out := map[string][]store.Reference{}
	for _, n := range names {
		out[n] = f.outgoing[n]
	}
	return out, store.Mark{Epoch: 1, Fence: 7}, nil
}

func (f *fakeStore) Closure(_ context.Context, roots []string, _, _, _ int) (*store.Closure, error) {
	f.reads++
	c := f.closure
	c.Epoch = 5
	if c.Delete == nil {
		for _, r := range roots {
			c.Delete = append(c.Delete, store.Doomed{Name: r, UUID: "uuid of " + r})
		}
	}
	c.Delete, c.Unset, c.Blockers = slices.Clone(c.Delete), slices.Clone(c.Unset), slices.Clone(c.Blockers)
	return &c, nil
}

func (f *fakeStore) BeginAttempt(_ context.Context, names []string) (map[string]store.Question, error) {
	f.begun = append(f.begun, names)
	out := map[string]store.Question{}
	for _, n := range names {
		out[n] = store.Question{Name: n, UUID: "uuid of " + n, Epoch: 1, RowVersion: 3}
	}
	return out, nil
}

func (f *fakeStore) Suspects(context.Context, []store.Location) ([]store.Location, error) {
	return f.suspects, nil
}

// last returns the writes of the last batch by name.
func (f *fakeStore) last() map[string]store.Write {
	GinkgoHelper()
	Expect(f.batches).NotTo(BeEmpty())
	out := map[string]store.Write{}
	for _, w := range f.batches[len(f.batches)-1] {
		out[w.Name] = w
	}
	return out
}

// fakePeer answers for one Deployment, and remembers what it was asked.
type fakePeer struct {
	mixin.Peer
	mu          sync.Mutex
	established []*v1.EstablishReferencesRequest
	establish   func(*v1.EstablishReferencesRequest) error
	asked       []*v1.CheckIfResourceIsBlockedRequest
	blocked     func(*v1.CheckIfResourceIsBlockedRequest) ([]*v1.BlockedAnswer, error)
	planned     []*v1.PlanDeletionRequest
	plan        func(*v1.PlanDeletionRequest) (*v1.PlanDeletionResponse, error)
}

func (f *fakePeer) EstablishReferences(_ context.Context, req *v1.EstablishReferencesRequest) (*v1.EstablishReferencesResponse, error) {
	f.mu.Lock()
	f.established = append(f.established, req)
	f.mu.Unlock()
	if f.establish != nil {
		if err := f.establish(req); err != nil {
			return nil, err
		}
	}
	res := &v1.EstablishReferencesResponse{Granted: req.GetTtl()}
	for i, t := range req.GetTargets() {
		res.Grants = append(res.Grants, &v1.Grant{Uuid: "uuid of " + t.GetName(), Epoch: 4, RowVersion: int64(2 * i)})
	}
	return res, nil
}

func (f *fakePeer) CheckIfResourceIsBlocked(_ context.Context, req *v1.CheckIfResourceIsBlockedRequest) (*v1.CheckIfResourceIsBlockedResponse, error) {
	f.mu.Lock()
	f.asked = append(f.asked, req)
	f.mu.Unlock()
	res := &v1.CheckIfResourceIsBlockedResponse{}
	for range req.GetTargets() {
		res.Answers = append(res.Answers, &v1.BlockedAnswer{})
	}
	if f.blocked != nil {
		answers, err := f.blocked(req)
		if err != nil {
			return nil, err
		}
		res.Answers = answers
	}
	return res, nil
}

func (f *fakePeer) PlanDeletion(_ context.Context, req *v1.PlanDeletionRequest) (*v1.PlanDeletionResponse, error) {
	f.mu.Lock()
	f.planned = append(f.planned, req)
	f.mu.Unlock()
	if f.plan == nil {
		return &v1.PlanDeletionResponse{}, nil
	}
	return f.plan(req)
}

// peers are the real ones, but for who answers.
type peers struct {
	*mixin.Peers
	answer map[store.Location]mixin.Peer
}

func (p *peers) Peer(at store.Location) (mixin.Peer, error) {
	if a := p.answer[at]; a != nil {
		return a, nil
	}
	return nil, store.Errorf(store.FailedPrecondition, "", "no Deployment %s is declared", at)
}

func newPeers(r *registry.Registry, at store.Location, version string) *peers {
	p := mixin.NewPeers(mixin.PeersConfig{Service: at.Service, Region: at.Region, Version: version, Topology: r})
	DeferCleanup(p.Close)
	return &peers{p, map[store.Location]mixin.Peer{}}
}

// body is a body in JSON.
func body(format string, args ...any) []byte { return fmt.Appendf(nil, format, args...) }
