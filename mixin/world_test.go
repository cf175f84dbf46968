package mixin_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"sigs.k8s.io/yaml"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/policy"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

func TestMixin(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "mixin")
}

// The services: secrets runs v2 and still knows v1; apps imports v1 of it, tools v2, and lone nothing.
const (
	secretsService = "secrets.example.com"
	appsService    = "apps.example.com"
	toolsService   = "tools.example.com"
	loneService    = "lone.example.com"
)

var descriptors = []string{`
service: secrets.example.com
multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}
versions:
- name: v1
  resources:
  - {type: Project, plural: projects, patterns: ["projects/{project}"], policyHolder: {field: policy}}
  - {type: Secret, plural: secrets, patterns: ["projects/{project}/secrets/{secret}"], parent: Project, onParentDeleted: CascadeDelete}
  - {type: Key, plural: keys, patterns: ["projects/{project}/keys/{key}"], parent: Project, onParentDeleted: CascadeDelete}
  - {type: Device, plural: devices, patterns: ["devices/{device}"]}
- name: v2
  imports: [{service: apps.example.com, version: v1}]
  resources:
  - {type: Project, plural: projects, patterns: ["projects/{project}"], policyHolder: {field: policy}}
  - {type: Secret, plural: secrets, patterns: ["projects/{project}/[regions/{region}/]secrets/{secret}"], parent: Project, onParentDeleted: CascadeDelete}
  - {type: Key, plural: keys, patterns: ["projects/{project}/regions/{region}/keys/{key}"], parent: Project, onParentDeleted: CascadeDelete}
  - {type: Device, plural: machines, patterns: ["machines/{device}"], references: [{field: app, target: apps.example.com/App, onTargetDeleted: AsyncUnset}]}
`, `
service: apps.example.com
multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}
versions:
- name: v1
  imports: [{service: secrets.example.com, version: v1}]
  resources:
  - {type: App, plural: apps, patterns: ["apps/{app}"], references: [{field: device, target: secrets.example.com/Device, onTargetDeleted: Block}]}
  - {type: Note, plural: notes, patterns: ["notes/{note}"], references: [{field: device, target: secrets.example.com/Device, onTargetDeleted: AsyncCascadeDelete}]}
  - type: Page
    plural: pages
    patterns: ["pages/{page}"]
    references: [{field: note, target: Note, onTargetDeleted: CascadeDelete}, {field: app, target: App, onTargetDeleted: Unset}, {field: holds, target: Note, onTargetDeleted: Block}]
`, `
service: tools.example.com
multiRegionPolicy: {enabledRegions: [eu], defaultControlRegion: eu}
versions:
- name: v1
  imports: [{service: secrets.example.com, version: v2}]
  resources:
  - {type: Tool, plural: tools, patterns: ["tools/{tool}"], references: [{field: device, target: secrets.example.com/Device, onTargetDeleted: AsyncUnset}]}
`, `
service: lone.example.com
multiRegionPolicy: {enabledRegions: [eu], defaultControlRegion: eu}
versions:
- name: v1
  resources:
  - {type: Item, plural: items, patterns: ["items/{item}"]}
`}

const ring = 256

func at(service, region string) store.Location {
	return store.Location{Service: service, Region: region}
}

var (
	secretsEU, secretsUS = at(secretsService, "eu"), at(secretsService, "us")
	appsEU, appsUS       = at(appsService, "eu"), at(appsService, "us")
	toolsEU, loneEU      = at(toolsService, "eu"), at(loneService, "eu")
)

// topology declares all Deployments; apps/off is disabled. edit may change them before they are declared.
func topology(edit func(*v1alpha1.Deployment)) *registry.Registry {
	GinkgoHelper()
	r := registry.New()
	declare(r, edit)
	return r
}

func declare(r *registry.Registry, edit func(*v1alpha1.Deployment)) {
	GinkgoHelper()
	var s registry.Snapshot
	for _, text := range descriptors {
		d := new(v1alpha1.ServiceDescriptor)
		Expect(yaml.UnmarshalStrict([]byte(text), &d.Spec)).To(Succeed())
		d.Name = d.Spec.Service
		s.Services = append(s.Services, d)
	}
	for _, l := range []store.Location{secretsEU, secretsUS, appsEU, appsUS, toolsEU, loneEU, at(appsService, "off")} {
		d := new(v1alpha1.Deployment)
		d.Name = l.Service + "." + l.Region
		d.Spec = v1alpha1.DeploymentSpec{Service: l.Service, Region: l.Region, Version: "v1", Endpoint: "http://127.0.0.1:1", Shards: ring, Disabled: l.Region == "off"}
		if l.Service == secretsService {
			d.Spec.Version = "v2"
		}
		if edit != nil {
			edit(d)
		}
		s.Deployments = append(s.Deployments, d)
	}
	Expect(r.Apply(s)).To(BeEmpty())
}

// call is what Peers.Call returns.
func call(requester, callee store.Location, version string) *v1.Call {
	return &v1.Call{Requester: mixin.WireLocation(requester), Callee: mixin.WireLocation(callee), Version: version}
}

// haveCode matches an error of package store, and the reason of a refusal.
func haveCode(code store.Code, reason string) OmegaMatcher {
	return And(HaveOccurred(), WithTransform(store.CodeOf, Equal(code)), WithTransform(mixin.ReasonOf, Equal(reason)))
}

// fakeCore answers from its fields and remembers what it was asked. A method without an answer panics.
type fakeCore struct {
	mixin.Core
	established []store.Establish
	refuse      error
	confirmed   []store.Confirmed
	missing     []string
	epochs      []int64
	questions   []store.Question
	owner       store.Location
	shadows     map[string]*store.Shadow
	added       []string
	block       chan struct{} // unless nil, CheckSubscriber waits for it
	entered     chan struct{}
}

func (f *fakeCore) Establish(_ context.Context, e store.Establish) ([]store.Grant, error) {
	f.established = append(f.established, e)
	if f.refuse != nil {
		return nil, f.refuse
	}
	grants := make([]store.Grant, len(e.Targets))
	for i, t := range e.Targets {
		grants[i] = store.Grant{TxID: e.TxID, UUID: t.Name, Epoch: 1, RowVersion: int64(i)}
	}
	return grants, nil
}

func (f *fakeCore) Confirm(_ context.Context, _ store.Location, refs []store.Confirmed) ([]string, error) {
	f.confirmed = append(f.confirmed, refs...)
	return f.missing, nil
}

func (f *fakeCore) ConfirmEpoch(_ context.Context, _ store.Location, epoch int64) error {
	f.epochs = append(f.epochs, epoch)
	return nil
}

func (f *fakeCore) CheckBlocked(_ context.Context, owner store.Location, targets []store.Question, _ []string) ([]store.BlockedAnswer, error) {
	f.owner, f.questions = owner, targets
	return make([]store.BlockedAnswer, len(targets)), nil
}

func (f *fakeCore) CheckSubscriber(ctx context.Context, owner store.Location, target store.Question) (int, []string, error) {
	f.owner, f.questions = owner, []store.Question{target}
	if f.block != nil {
		f.entered <- struct{}{}
		select {
		case <-f.block:
		case <-ctx.Done():
			return 0, nil, ctx.Err()
		}
	}
	return 7, []string{"apps/a"}, nil
}

func (f *fakeCore) CheckOwnee(context.Context, string, store.Location, []string) (bool, error) {
	return true, nil
}

func (f *fakeCore) AddOwnee(_ context.Context, owner string, _ store.Location) (bool, store.ShadowState, error) {
	h := f.shadows[owner]
	if h == nil {
		return false, store.NoShadow, nil
	}
	if h.State == store.ShadowActive {
		f.added = append(f.added, owner)
	}
	return true, h.State, nil
}

func (f *fakeCore) Shadow(_ context.Context, name string) (*store.Shadow, error) {
	if h := f.shadows[name]; h != nil {
		return h, nil
	}
	return nil, store.Errorf(store.NotFound, name, "has no shadow")
}

// policies says that eu governs everything, but for the projects that it names; one without a region does not exist.
type policies map[string]string

func (p policies) Of(_ context.Context, n descriptor.Name, _ map[string][]byte) (*descriptor.Policy, string, error) {
	region, ok := p[n.HolderName()]
	if !ok {
		region = "eu"
	}
	if region == "" {
		return nil, "", fmt.Errorf("policy: %w", &policy.MissingHolderError{Name: n.Full, Holder: n.HolderName()})
	}
	out, faults := descriptor.NewPolicy(&v1alpha1.MultiRegionPolicy{EnabledRegions: []string{"eu", "us"}, DefaultControlRegion: region}, nil)
	if len(faults) > 0 {
		return nil, "", faults.ToAggregate()
	}
	return out, n.HolderName(), nil
}

func (p policies) Owner(ctx context.Context, n descriptor.Name, _ []store.Write) (string, error) {
	governing, _, err := p.Of(ctx, n, nil)
	if err != nil {
		return "", err
	}
	region, _ := descriptor.OwningRegion(n, governing)
	return region, nil
}

// never wakes nobody.
type never struct{}

func (never) Follow(ctx context.Context, _ feed.Interest, step func(context.Context) (bool, error)) error {
	for {
		if more, err := step(ctx); err != nil || !more {
			return err
		}
	}
}

// newServer returns the mixin of secrets/eu, unless edit says otherwise.
func newServer(r *registry.Registry, core mixin.Core, edit func(*mixin.Config)) *mixin.Server {
	GinkgoHelper()
	type nothing struct{ store.Store }
	cfg := mixin.Config{
		Service: secretsService, Region: "eu", Version: "v2", Topology: r, Core: core,
		Store: nothing{}, Owners: policies{}, Policies: policies{}, Changes: never{}, Logger: slog.New(slog.DiscardHandler),
	}
	if edit != nil {
		edit(&cfg)
	}
	s, err := mixin.NewServer(cfg)
	Expect(err).NotTo(HaveOccurred())
	return s
}

func newPeers(r *registry.Registry, self store.Location, version string) *mixin.Peers {
	p := mixin.NewPeers(mixin.PeersConfig{Service: self.Service, Region: self.Region, Version: version, Topology: r})
	DeferCleanup(p.Close)
	return p
}
