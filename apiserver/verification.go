package apiserver

import (
	"context"
	"fmt"
	"math"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/verify"
)

// Verifier compares the copies of this Deployment with their owners, for operators. Its errors are of package store where a user can do something about them.
type Verifier interface {
	// Peers are the other regions of the service and, if there is one, the own search store (verify.SearchPeer).
	Peers() []string
	// Verify runs a pass over the copies of a peer or the search store, or goes on with one, as verify.Run.
	Verify(ctx context.Context, peer string, opt verify.Options, from verify.State, report func(verify.Progress) error) (verify.State, error)
	// Verified lists up to when copies are verified.
	Verified(ctx context.Context) ([]postgres.Verified, error)
	// Residency counts what the database holds, with the regions of the service that count as owners.
	Residency(ctx context.Context) (rows []postgres.Residency, regions []string, err error)
}

// verificationService is the RPC form of a Verifier.
type verificationService struct{ s *Server }

func (v verificationService) verifier() (Verifier, error) {
	if v.s.cfg.Verifier == nil {
		return nil, fail(connect.CodeUnimplemented, "NOT_SERVED", nil, nil, "this server verifies nothing")
	}
	return v.s.cfg.Verifier, nil
}

// Verify runs passes one after the other and streams their progress.
func (v verificationService) Verify(ctx context.Context, req *connect.Request[dbcontrollerv1.VerifyRequest], stream *connect.ServerStream[dbcontrollerv1.VerifyResponse]) error {
	verifier, err := v.verifier()
	if err != nil {
		return err
	}
	m := req.Msg
	opt := verify.Options{Types: m.GetTypes(), Mode: verify.Mode(m.GetRepair()), Rate: int(m.GetRate()), Pause: m.GetPause()}
	switch {
	case opt.Mode < verify.Report || opt.Mode > verify.Repair:
		return invalid("repair", "%d is no mode of repair", m.GetRepair())
	case opt.Rate < 0:
		return invalid("rate", "%d rows per second: want 0 for no limit, or more", opt.Rate)
	case math.IsNaN(opt.Pause) || opt.Pause < 0 || opt.Pause > 1000:
		return invalid("pause", "%v times a step: want 0 to 1000", opt.Pause)
	}
	for i, t := range opt.Types {
		if err := v.s.isType(t); err != nil {
			return invalid("types", "entry %d: %v", i, err)
		}
	}
	from := map[string]verify.State{}
	for i, r := range m.GetResume() {
		state, err := verify.ParseState(r.GetState())
		if err != nil {
			return invalid("resume", "entry %d: %v", i, err)
		}
		from[r.GetPeer()] = state
	}
	peers := m.GetPeers()
	if len(peers) == 0 {
		peers = verifier.Peers()
	}
	for _, peer := range peers {
		_, err := verifier.Verify(ctx, peer, opt, from[peer], func(p verify.Progress) error {
			return v.s.within(ctx, func() error { return stream.Send(verifyResponse(peer, p)) })
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// isType says what is wrong with the name of a type.
func (s *Server) isType(name string) error {
	v, err := s.version()
	if err != nil {
		return err
	}
	if v.Type(name) == nil {
		return fmt.Errorf("%q is no type of %s %s", name, s.cfg.Service, s.cfg.Version)
	}
	return nil
}

func verifyResponse(peer string, p verify.Progress) *dbcontrollerv1.VerifyResponse {
	s := p.State
	differences, repaired := s.Counts()
	res := &dbcontrollerv1.VerifyResponse{Peer: peer, State: s.Token(), Progress: &dbcontrollerv1.VerifyProgress{
		Done: s.Done, Total: s.Total, Compared: s.Compared, Differences: differences, Repaired: repaired, Pending: int64(len(s.Pending)),
		RowsPerSecond: p.Rate, Finished: s.Finished,
	}}
	if p.ETA >= 0 {
		res.Progress.Eta = durationpb.New(p.ETA)
	}
	if t := s.VerifiedThrough(); !t.IsZero() {
		res.Progress.VerifiedThrough = timestamppb.New(t)
	}
	for _, d := range p.Found {
		res.Differences = append(res.Differences, &dbcontrollerv1.RowDifference{
			Name: d.Name, Type: d.Type, Kind: string(d.Kind), OwnerVersion: versionText(d.Truth), CopyVersion: versionText(d.Mirror),
			Behind: d.Behind, Action: d.Action, Repaired: d.Repaired,
		})
	}
	return res
}

func versionText(v store.Version) string {
	if v == (store.Version{}) {
		return ""
	}
	return fmt.Sprintf("%d.%d", v.Epoch, v.Number)
}

// ListVerified answers what is verified.
func (v verificationService) ListVerified(ctx context.Context, _ *connect.Request[dbcontrollerv1.ListVerifiedRequest]) (*connect.Response[dbcontrollerv1.ListVerifiedResponse], error) {
	verifier, err := v.verifier()
	if err != nil {
		return nil, err
	}
	types, err := verifiedTypes(ctx, verifier)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&dbcontrollerv1.ListVerifiedResponse{Types: types}), nil
}

func verifiedTypes(ctx context.Context, v Verifier) ([]*dbcontrollerv1.VerifiedType, error) {
	all, err := v.Verified(ctx)
	if err != nil {
		return nil, err
	}
	types := make([]*dbcontrollerv1.VerifiedType, len(all))
	for i, t := range all {
		types[i] = &dbcontrollerv1.VerifiedType{Peer: t.Peer, Type: t.Type, FinishedAt: timestamppb.New(t.FinishedAt), Compared: t.Compared, Differences: t.Differences}
		if !t.Through.IsZero() {
			types[i].VerifiedThrough = timestamppb.New(t.Through)
		}
	}
	return types, nil
}

// Residency answers what the region holds.
func (v verificationService) Residency(ctx context.Context, _ *connect.Request[dbcontrollerv1.ResidencyRequest]) (*connect.Response[dbcontrollerv1.ResidencyResponse], error) {
	verifier, err := v.verifier()
	if err != nil {
		return nil, err
	}
	rows, regions, err := verifier.Residency(ctx)
	if err != nil {
		return nil, err
	}
	res := &dbcontrollerv1.ResidencyResponse{Region: v.s.cfg.Region, Query: postgres.ResidencySQL, Parameters: postgres.ResidencyParameters(v.s.cfg.Region, regions)}
	for _, r := range rows {
		res.Rows = append(res.Rows, &dbcontrollerv1.ResidentRows{OwningRegion: r.Owner, Type: r.Type, Reason: r.Reason, Count: r.Rows, Example: r.Example})
	}
	if res.Verified, err = verifiedTypes(ctx, verifier); err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}
