package mixin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
)

// ttlOf is how long a grant lasts that was asked for.
func ttlOf(asked time.Duration) time.Duration {
	if asked == 0 {
		return DefaultTTL
	}
	return min(max(asked, MinTTL), MaxTTL)
}

// EstablishReferences implements Peer (spec 3.1; F9 to F11).
func (s *Server) EstablishReferences(ctx context.Context, req *v1.EstablishReferencesRequest) (*v1.EstablishReferencesResponse, error) {
	requester, end, err := s.begin(req.GetCall(), importer, false)
	if err != nil {
		return nil, err
	}
	defer end()
	own, spelled, err := s.understand(req.GetCall().GetVersion())
	if err != nil {
		return nil, err
	}
	if err := cmp.Or(s.foreign(requester), checkName("referrer", req.GetReferrer()), checkUUID("tx_id", req.GetTxId()), checkCount("targets", len(req.GetTargets()), 1)); err != nil {
		return nil, err
	}
	if req.GetTxAttempt() < 1 {
		return nil, invalid("tx_attempt", "is %d, want 1 or more", req.GetTxAttempt())
	}
	e := store.Establish{Requester: requester, Referrer: req.GetReferrer(), TxID: req.GetTxId(), Attempt: int(req.GetTxAttempt()), TTL: ttlOf(req.GetTtl().AsDuration())}
	var missing []string
	elsewhere := map[string][]string{}
	asked := map[string]string{}                // what the requester calls our names
	place := map[string]int{}                   // in e.Targets
	order := make([]int, len(req.GetTargets())) // of the targets asked for
	for i, t := range req.GetTargets() {
		field := fmt.Sprintf("targets[%d].name", i)
		if err := checkName(field, t.GetName()); err != nil {
			return nil, err
		}
		if _, err := spelled.ParseName(t.GetName()); err != nil {
			return nil, invalid(field, "%v", err)
		}
		n, ok, err := s.ours(ctx, own, spelled, t.GetName())
		if err != nil {
			return nil, err
		}
		if !ok {
			missing = append(missing, t.GetName())
			continue
		}
		region, err := s.owner(ctx, n)
		switch {
		case store.CodeOf(err) == store.NotFound:
			missing = append(missing, t.GetName())
			continue
		case err != nil:
			return nil, err
		case region != s.cfg.Region:
			elsewhere[region] = append(elsewhere[region], t.GetName())
			continue
		}
		j, again := place[n.Full]
		if !again {
			j = len(e.Targets)
			place[n.Full], asked[n.Full] = j, t.GetName()
			e.Targets = append(e.Targets, store.EstablishTarget{Name: n.Full})
		}
		e.Targets[j].Blocking = e.Targets[j].Blocking || t.GetBlocking()
		e.Targets[j].Subscriber = e.Targets[j].Subscriber || t.GetSubscriber()
		order[i] = j
	}
	for _, region := range slices.Sorted(maps.Keys(elsewhere)) {
		e := about(store.FailedPrecondition, elsewhere[region], fmt.Sprintf("is owned by region %s: establish the reference there", region))
		return nil, &Refusal{e, ReasonWrongRegion, map[string]string{MetadataRegion: region}}
	}
	if len(missing) > 0 {
		return nil, about(store.NotFound, missing, "does not exist")
	}
	grants, err := s.cfg.Core.Establish(ctx, e)
	if err != nil {
		return nil, respell(err, asked)
	}
	res := &v1.EstablishReferencesResponse{Granted: durationpb.New(e.TTL)}
	for _, j := range order {
		res.Grants = append(res.Grants, &v1.Grant{Uuid: grants[j].UUID, Epoch: grants[j].Epoch, RowVersion: grants[j].RowVersion})
	}
	return res, nil
}

// about is an error about several targets, as the core makes them too.
func about(code store.Code, names []string, reason string) *store.Error {
	e := &store.Error{Code: code, Name: names[0], Reason: reason}
	for _, n := range names {
		e.Violations = append(e.Violations, store.Violation{Field: n, Description: reason})
	}
	return e
}

// owner returns the owning region of a resource; NotFound if nothing can be there.
func (s *Server) owner(ctx context.Context, n descriptor.Name) (string, error) {
	region, err := s.cfg.Owners.Owner(ctx, n, nil)
	if e, ok := errors.AsType[*store.Error](err); ok && e.Code == store.FailedPrecondition && e.Name == n.Full {
		return "", store.Errorf(store.NotFound, n.Full, "does not exist") // nor does the policy holder above it
	}
	return region, err
}

// respell returns an error about names of ours as one about what the requester calls them.
func respell(err error, asked map[string]string) error {
	e, ok := errors.AsType[*store.Error](err)
	if !ok {
		return err
	}
	ours := make([]string, 0, len(asked))
	for name, theirs := range asked {
		if name != theirs {
			ours = append(ours, name)
		}
	}
	if len(ours) == 0 {
		return err
	}
	slices.SortFunc(ours, func(a, b string) int { return cmp.Or(len(b)-len(a), strings.Compare(a, b)) }) // one name may begin another
	pairs := make([]string, 0, 2*len(ours))
	for _, name := range ours {
		pairs = append(pairs, name, asked[name])
	}
	r := strings.NewReplacer(pairs...)
	out := *e
	out.Name, out.Reason = r.Replace(e.Name), r.Replace(e.Reason)
	out.Violations = slices.Clone(e.Violations)
	for i, v := range out.Violations {
		out.Violations[i] = store.Violation{Field: r.Replace(v.Field), Description: r.Replace(v.Description)}
	}
	return &out
}

// ConfirmBlockades implements Peer (spec 3.2; F12).
func (s *Server) ConfirmBlockades(ctx context.Context, req *v1.ConfirmBlockadesRequest) (*v1.ConfirmBlockadesResponse, error) {
	requester, end, err := s.begin(req.GetCall(), importer, false)
	if err != nil {
		return nil, err
	}
	defer end()
	own, spelled, err := s.understand(req.GetCall().GetVersion())
	if err != nil {
		return nil, err
	}
	least := 1
	if req.GetCompleteEpoch() != 0 {
		least = 0
	}
	if err := cmp.Or(s.foreign(requester), checkCount("references", len(req.GetReferences()), least)); err != nil {
		return nil, err
	}
	res := &v1.ConfirmBlockadesResponse{}
	asked := map[string][]string{} // what the requester calls our names
	refs := make([]store.Confirmed, 0, len(req.GetReferences()))
	for i, r := range req.GetReferences() {
		field := fmt.Sprintf("references[%d].", i)
		if err := cmp.Or(checkName(field+"referrer", r.GetReferrer()), checkName(field+"name", r.GetName())); err != nil {
			return nil, err
		}
		if r.GetTxId() != "" {
			if err := checkUUID(field+"tx_id", r.GetTxId()); err != nil {
				return nil, err
			}
		}
		n, ok, err := s.ours(ctx, own, spelled, r.GetName())
		if err != nil {
			return nil, err
		}
		if !ok {
			res.Missing = append(res.Missing, r.GetName())
			continue
		}
		asked[n.Full] = append(asked[n.Full], r.GetName())
		refs = append(refs, store.Confirmed{Referrer: r.GetReferrer(), Name: n.Full, Blocking: r.GetBlocking(), Subscriber: r.GetSubscriber(), TxID: r.GetTxId()})
	}
	if len(refs) > 0 {
		missing, err := s.cfg.Core.Confirm(ctx, requester, refs)
		if err != nil {
			return nil, err
		}
		for _, name := range missing {
			res.Missing = append(res.Missing, asked[name]...)
		}
	}
	slices.Sort(res.Missing)
	res.Missing = slices.Compact(res.Missing)
	if req.GetCompleteEpoch() != 0 {
		if err := s.cfg.Core.ConfirmEpoch(ctx, requester, req.GetCompleteEpoch()); err != nil {
			return nil, err
		}
	}
	return res, nil
}

// question reads a Question of the wire.
func question(field string, q *v1.Question) (store.Question, error) {
	if err := cmp.Or(checkName(field+".name", q.GetName()), checkUUID(field+".uuid", q.GetUuid())); err != nil {
		return store.Question{}, err
	}
	return store.Question{Name: q.GetName(), UUID: q.GetUuid(), Epoch: q.GetEpoch(), RowVersion: q.GetRowVersion()}, nil
}

// CheckIfResourceIsBlocked implements Peer (spec 3.3; F13).
func (s *Server) CheckIfResourceIsBlocked(ctx context.Context, req *v1.CheckIfResourceIsBlockedRequest) (*v1.CheckIfResourceIsBlockedResponse, error) {
	requester, end, err := s.begin(req.GetCall(), imported, false)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := cmp.Or(s.speaks(requester, req.GetCall().GetVersion()),
		checkCount("targets", len(req.GetTargets()), 1), checkCount("excluding", len(req.GetExcluding()), 0)); err != nil {
		return nil, err
	}
	questions := make([]store.Question, len(req.GetTargets()))
	for i, t := range req.GetTargets() {
		if questions[i], err = question(fmt.Sprintf("targets[%d]", i), t); err != nil {
			return nil, err
		}
	}
	for i, name := range req.GetExcluding() {
		if err := checkName(fmt.Sprintf("excluding[%d]", i), name); err != nil {
			return nil, err
		}
	}
	answers, err := s.cfg.Core.CheckBlocked(ctx, s.local(requester), questions, req.GetExcluding())
	if err != nil {
		return nil, err
	}
	res := &v1.CheckIfResourceIsBlockedResponse{}
	for _, a := range answers {
		res.Answers = append(res.Answers, &v1.BlockedAnswer{Blocked: a.Blocked, HasAnyReference: a.HasAny, Sample: a.Sample})
	}
	return res, nil
}

// CheckIfResourceHasDeletionSubscriber implements Peer (spec 3.4; F16).
func (s *Server) CheckIfResourceHasDeletionSubscriber(ctx context.Context, req *v1.CheckIfResourceHasDeletionSubscriberRequest) (*v1.CheckIfResourceHasDeletionSubscriberResponse, error) {
	requester, end, err := s.begin(req.GetCall(), imported, false)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := s.speaks(requester, req.GetCall().GetVersion()); err != nil {
		return nil, err
	}
	q, err := question("target", req.GetTarget())
	if err != nil {
		return nil, err
	}
	count, sample, err := s.cfg.Core.CheckSubscriber(ctx, s.local(requester), q)
	if err != nil {
		return nil, err
	}
	return &v1.CheckIfResourceHasDeletionSubscriberResponse{HasSubscriber: count > 0, Count: int32(count), Sample: sample}, nil
}
