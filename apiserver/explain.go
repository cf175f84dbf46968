package apiserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/timestamppb"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/policy"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// Explainer is what Explain reads besides the Store. All of it is required.
type Explainer struct {
	// Policies knows the policy that governs a name, and whose it is: policy.Cache.
	Policies interface {
		Of(ctx context.Context, n descriptor.Name, pending map[string][]byte) (p *descriptor.Policy, holder string, err error)
	}
	// Core knows the references of the resources that are owned here, and what could not be applied here: postgres.Store.
	Core interface {
		Shadow(ctx context.Context, name string) (*store.Shadow, error)
		Closure(ctx context.Context, roots []string, limit, depth, async int) (*store.Closure, error)
		HandledReferrers(ctx context.Context, at store.Location, target, uuid string, limit int) ([]store.Incoming, error)
		Ownees(ctx context.Context, at store.Location, names []string, after string, limit int) ([]string, error)
		Suspects(ctx context.Context, candidates []store.Location) ([]store.Location, error)
		QuarantineOf(ctx context.Context, name string) (*postgres.Quarantined, error)
		PolicyWalk(ctx context.Context, holder string) (*store.PolicyWalk, error)
	}
	// Peers knows which Deployments may refer to resources of this one: mixin.Peers.
	Peers interface{ Importers() []store.Location }
}

// Limits of an explanation.
const (
	// askTimeout is how long another region may take to say what it holds.
	askTimeout = 2 * time.Second
	// maxReferrers is how many referrers are named.
	maxReferrers = 20
)

func (s *Server) explain(ctx context.Context, req *dbcontrollerv1.ExplainRequest) (*dbcontrollerv1.Explanation, error) {
	if s.cfg.Explainer == nil {
		return nil, fail(connect.CodeUnimplemented, "NOT_SERVED", nil, nil, "this server explains nothing")
	}
	v, err := s.version()
	if err != nil {
		return nil, err
	}
	name, err := parseName(v, "name", req.GetName())
	if err != nil {
		return nil, err
	}
	if !req.GetLocalOnly() {
		p, err := s.route(ctx, write{Write: store.Write{Op: store.Delete, Name: name.Full}, name: name})
		if e, ok := errors.AsType[*store.Error](err); ok && e.Code == store.FailedPrecondition { // the policy holder may be on its way here
			return nil, store.Errorf(store.FailedPrecondition, name.Full,
				"region %s cannot tell who owns it, %s; ask another region, or ask with local_only what this one knows", s.cfg.Region, e.Reason)
		}
		if err != nil {
			return nil, err
		}
		if p != nil {
			res, err := forward(ctx, s, p, p.client.Explain, req)
			if connect.CodeOf(err) == connect.CodeUnavailable {
				return nil, fail(connect.CodeUnavailable, "OWNER_UNREACHABLE", map[string]string{"owningRegion": p.region}, nil,
					"region %s owns %s and does not answer: repeat later, or ask with local_only what region %s alone knows", p.region, name, s.cfg.Region)
			}
			return res, err
		}
	}
	e, row, err := s.explainHere(ctx, name)
	if err != nil || req.GetLocalOnly() {
		return e, err
	}
	e.Regions = append(e.Regions, s.askRegions(ctx, name.Full)...)
	for _, r := range e.Regions {
		r.Expected = row != nil && (slices.Contains(row.Regions, r.GetRegion()) || slices.Contains(row.Regions, store.EveryRegion))
	}
	return e, known(e)
}

// known refuses a name of which no region that could be asked knows anything.
func known(e *dbcontrollerv1.Explanation) error {
	if e.GetState() != "" {
		return nil
	}
	silent := ""
	for _, r := range e.GetRegions() {
		switch {
		case r.GetState() != "" || r.GetQuarantine() != nil:
			return nil
		case r.GetError() != "":
			silent += fmt.Sprintf("; region %s could not be asked: %s", r.GetRegion(), r.GetError())
		}
	}
	return store.Errorf(store.NotFound, e.GetName(), "does not exist: no region holds it%s. It would belong to region %s: %s",
		silent, e.GetOwner().GetRegion(), e.GetOwner().GetReason())
}

// explainHere is what this region knows. row is nil if it holds nothing.
func (s *Server) explainHere(ctx context.Context, name descriptor.Name) (e *dbcontrollerv1.Explanation, row *store.Resource, err error) {
	e = &dbcontrollerv1.Explanation{Name: name.Full, Type: name.Type.Name, AnsweredBy: s.cfg.Region}
	if e.Owner, err = s.decision(ctx, name); err != nil {
		return nil, nil, err
	}
	held := &dbcontrollerv1.RegionState{Region: s.cfg.Region}
	e.Regions = []*dbcontrollerv1.RegionState{held}
	switch row, err = s.cfg.Store.Get(ctx, name.Full); {
	case store.CodeOf(err) == store.NotFound:
	case err != nil:
		return nil, nil, err
	default:
		held.State, held.Etag, held.OwningRegion = row.State.String(), row.Version.ETag(), row.OwningRegion
		held.ResourceVersion, held.Epoch = strconv.FormatInt(row.Version.Number, 10), row.Version.Epoch
		held.UpdateTime = timestamppb.New(row.UpdateTime)
		e.State, e.Uuid, e.DeleteTime = row.State.String(), row.UUID, wireTime(row.DeleteTime)
	}
	if held.Quarantine, err = s.quarantined(ctx, name.Full); err != nil {
		return nil, nil, err
	}
	if e.PolicyProgress, err = s.policyProgress(ctx, name, e.GetOwner()); err != nil {
		return nil, nil, err
	}
	switch shadow, err := s.cfg.Explainer.Core.Shadow(ctx, name.Full); {
	case store.CodeOf(err) == store.NotFound:
		return e, row, nil
	case err != nil:
		return nil, nil, err
	default:
		return e, row, s.explainShadow(ctx, e, shadow)
	}
}

func wireTime(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// decision says who owns a name, and why. That nobody can is no error.
func (s *Server) decision(ctx context.Context, n descriptor.Name) (*dbcontrollerv1.OwnerDecision, error) {
	owner, err := s.cfg.Owners.Owner(ctx, n, nil)
	if e, ok := errors.AsType[*store.Error](err); ok && e.Code == store.FailedPrecondition {
		return &dbcontrollerv1.OwnerDecision{Reason: e.Reason}, nil
	}
	if err != nil {
		return nil, err
	}
	d := &dbcontrollerv1.OwnerDecision{Region: owner}
	if _, ok := n.Region(); ok {
		d.By, d.Reason = dbcontrollerv1.OwnerDecision_BY_NAME, "the name says so"
		return d, nil
	}
	p, holder, err := s.cfg.Explainer.Policies.Of(ctx, n, nil)
	missing, orphaned := errors.AsType[*policy.MissingHolderError](err)
	switch {
	case orphaned:
		d.By, d.PolicyHolder = dbcontrollerv1.OwnerDecision_BY_RESOURCE, missing.Holder
		d.Reason = "its policy holder " + missing.Holder + " does not exist, and the resource itself says so"
	case err != nil:
		return nil, err
	case p == nil:
		d.By, d.Reason = dbcontrollerv1.OwnerDecision_BY_NO_POLICY, "there is no policy: the service runs without regions"
	case holder == "":
		d.By, d.Reason = dbcontrollerv1.OwnerDecision_BY_SERVICE_POLICY, "the default control region of the policy of service "+s.cfg.Service
	default:
		d.By, d.PolicyHolder, d.Reason = dbcontrollerv1.OwnerDecision_BY_POLICY_HOLDER, holder, "the default control region of the policy of "+holder
	}
	return d, nil
}

func (s *Server) quarantined(ctx context.Context, name string) (*dbcontrollerv1.QuarantinedVersion, error) {
	q, err := s.cfg.Explainer.Core.QuarantineOf(ctx, name)
	if q == nil || err != nil {
		return nil, err
	}
	return &dbcontrollerv1.QuarantinedVersion{
		ResourceVersion: strconv.FormatInt(q.Version.Number, 10), Epoch: q.Version.Epoch, Cause: q.Cause, Tries: int32(q.Tries),
	}, nil
}

// policyProgress tells of the policies that are being carried out here: the one that governs the resource, and its own.
func (s *Server) policyProgress(ctx context.Context, name descriptor.Name, owner *dbcontrollerv1.OwnerDecision) (all []*dbcontrollerv1.PolicyProgress, err error) {
	var holders []string
	switch owner.GetBy() {
	case dbcontrollerv1.OwnerDecision_BY_POLICY_HOLDER, dbcontrollerv1.OwnerDecision_BY_SERVICE_POLICY:
		holders = append(holders, owner.GetPolicyHolder())
	default: // no policy decides
	}
	if name.Type.IsPolicyHolder() && !slices.Contains(holders, name.Full) {
		holders = append(holders, name.Full)
	}
	for _, holder := range holders {
		w, err := s.cfg.Explainer.Core.PolicyWalk(ctx, holder)
		if err != nil {
			return nil, err
		}
		if w == nil || w.Done {
			continue
		}
		all = append(all, &dbcontrollerv1.PolicyProgress{
			Holder: w.Holder, Round: int32(w.Round), Total: w.Total, Checked: w.Checked, Changed: w.Changed, After: w.After,
			Ahead: holder != name.Full && name.Full > w.After, Since: wireTime(w.Started), UpdateTime: wireTime(w.Updated),
		})
	}
	return all, nil
}

// explainShadow adds what refers to what, and what is still to be done.
func (s *Server) explainShadow(ctx context.Context, e *dbcontrollerv1.Explanation, sh *store.Shadow) error {
	if e.State == "" {
		e.State = sh.ResourceState.String()
	}
	e.Uuid, e.DeleteTime, e.BlockDeletion = sh.UUID, wireTime(sh.DeleteTime), sh.BlockDeletion
	deleting := sh.State == store.ShadowDeleting
	work := &dbcontrollerv1.PendingWork{LastError: sh.LastError, NextRetry: wireTime(sh.NextRetry)}
	switch {
	case deleting:
		work.State, work.Since, e.Pending = "DELETING", e.DeleteTime, work
	case sh.Tasks != 0:
		work.State, work.Tasks, work.Since, e.Pending = "PENDING", sh.Tasks.Strings(), wireTime(sh.TaskTime), work
	}
	for i, r := range sh.References {
		e.References = append(e.References, &dbcontrollerv1.OutgoingReference{
			Kind: r.Kind.String(), Field: r.Field, Target: r.Target, Location: s.spelled(r.At), OnTargetDeleted: r.Behavior.String(), Unconfirmed: sh.Unconfirmed[i],
		})
	}
	for _, src := range sh.Sources {
		e.ReferredFrom = append(e.ReferredFrom, &dbcontrollerv1.IncomingReferences{
			Location: s.spelled(src.Location), Blocking: src.Blocking, Subscriber: src.Subscriber, Ownee: src.Ownee, Awaited: deleting && (src.Subscriber || src.Ownee),
		})
	}
	for _, b := range sh.Blockades {
		e.Blockades = append(e.Blockades, &dbcontrollerv1.Blockade{Location: s.spelled(b.Location), Referrer: b.Referrer, ExpireTime: wireTime(b.ExpireTime)})
	}
	if deleting {
		if err := s.awaitSuspects(ctx, e); err != nil {
			return err
		}
	}
	return s.referrers(ctx, e)
}

// spelled names this Deployment where the zero Location stands for it.
func (s *Server) spelled(at store.Location) string {
	if at == (store.Location{}) {
		at = s.self()
	}
	return at.String()
}

// awaitSuspects adds the Deployments that a deletion waits for because a failover may have lost what they refer to.
func (s *Server) awaitSuspects(ctx context.Context, e *dbcontrollerv1.Explanation) error {
	suspects, err := s.cfg.Explainer.Core.Suspects(ctx, s.cfg.Explainer.Peers.Importers())
	if err != nil {
		return err
	}
	for _, at := range suspects {
		i := slices.IndexFunc(e.ReferredFrom, func(in *dbcontrollerv1.IncomingReferences) bool { return in.GetLocation() == at.String() })
		if i < 0 {
			i = len(e.ReferredFrom)
			e.ReferredFrom = append(e.ReferredFrom, &dbcontrollerv1.IncomingReferences{Location: at.String()})
		}
		e.ReferredFrom[i].Awaited = true
	}
	return nil
}

// referrers names resources of this Deployment that refer to the name. One more of each kind is asked for than is shown.
func (s *Server) referrers(ctx context.Context, e *dbcontrollerv1.Explanation) error {
	core := s.cfg.Explainer.Core
	closure, err := core.Closure(ctx, []string{e.Name}, maxReferrers, 0, 0)
	if err != nil {
		return err
	}
	handled, err := core.HandledReferrers(ctx, store.Location{}, e.Name, "", maxReferrers+1)
	if err != nil {
		return err
	}
	ownees, err := core.Ownees(ctx, s.self(), []string{e.Name}, "", maxReferrers+1)
	if err != nil {
		return err
	}
	var all []store.Incoming
	for _, d := range closure.Delete {
		all = append(all, d.Via)
	}
	for _, b := range closure.Blockers {
		if b.Location == (store.Location{}) && b.Referrer != "" {
			all = append(all, store.Incoming{Referrer: b.Referrer, Field: b.Field, Target: b.Target, Behavior: store.Block})
		}
	}
	all = slices.Concat(all, closure.Unset, handled)
	all = slices.DeleteFunc(all, func(in store.Incoming) bool { return in.Target != e.Name })
	for _, name := range ownees {
		all = append(all, store.Incoming{Referrer: name, Field: "metadata.ownerReferences"})
	}
	slices.SortFunc(all, func(a, b store.Incoming) int {
		return cmp.Or(strings.Compare(a.Referrer, b.Referrer), strings.Compare(a.Field, b.Field))
	})
	e.MoreReferrers = len(all) > maxReferrers
	for _, in := range all[:min(len(all), maxReferrers)] {
		e.Referrers = append(e.Referrers, &dbcontrollerv1.Referrer{Name: in.Referrer, Field: in.Field, OnTargetDeleted: in.Behavior.String()})
	}
	return nil
}

// askRegions asks all other regions of the service, at the same time, what they hold. One that does not answer is said to be silent.
func (s *Server) askRegions(ctx context.Context, name string) []*dbcontrollerv1.RegionState {
	others := slices.DeleteFunc(slices.Clone(s.cfg.Topology.View().DeploymentsOf(s.cfg.Service)), func(d registry.Deployment) bool { return d.Region == s.cfg.Region })
	slices.SortFunc(others, func(a, b registry.Deployment) int { return strings.Compare(a.Region, b.Region) })
	out := make([]*dbcontrollerv1.RegionState, len(others))
	var g errgroup.Group
	for i, d := range others {
		g.Go(func() error {
			out[i] = s.askRegion(ctx, d, name)
			return nil
		})
	}
	_ = g.Wait()
	return out
}

func (s *Server) askRegion(ctx context.Context, d registry.Deployment, name string) *dbcontrollerv1.RegionState {
	silent := func(format string, args ...any) *dbcontrollerv1.RegionState {
		return &dbcontrollerv1.RegionState{Region: d.Region, Error: fmt.Sprintf(format, args...)}
	}
	switch {
	case d.Disabled:
		return silent("its Deployment is disabled")
	case s.cfg.TLS != nil && !strings.HasPrefix(d.Endpoint, "https://"):
		return silent("its Deployment has no https endpoint")
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	req := connect.NewRequest(&dbcontrollerv1.ExplainRequest{Name: name, LocalOnly: true})
	req.Header().Set(dbcontrollerv1.ForwardedByHeader, s.cfg.Region)
	res, err := s.peers.client(s, d).Explain(ctx, req)
	switch e, _ := errors.AsType[*connect.Error](err); {
	case err != nil && connect.IsWireError(err):
		return silent("it answers: %s", e.Message())
	case err != nil && ctx.Err() != nil:
		return silent("it did not answer within %v", askTimeout)
	case err != nil:
		s.log.WarnContext(ctx, "region cannot be reached", "region", d.Region, "error", err)
		return silent("it cannot be reached")
	case len(res.Msg.GetRegions()) == 0 || res.Msg.GetRegions()[0].GetRegion() != d.Region:
		return silent("its answer is about another region")
	}
	return res.Msg.GetRegions()[0]
}
