package main

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect"
	. "github.com/onsi/gomega"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// verification answers with what a test wants, and keeps what it was asked.
type verification struct {
	dbcontrollerv1connect.UnimplementedVerificationHandler
	asked   []*v1.VerifyRequest
	answers []*v1.VerifyResponse
	err     error
	rows    []*v1.ResidentRows
}

func (v *verification) Verify(_ context.Context, r *connect.Request[v1.VerifyRequest], s *connect.ServerStream[v1.VerifyResponse]) error {
	v.asked = append(v.asked, r.Msg)
	for _, a := range v.answers {
		if err := s.Send(a); err != nil {
			return err
		}
	}
	return v.err
}

func (v *verification) Residency(context.Context, *connect.Request[v1.ResidencyRequest]) (*connect.Response[v1.ResidencyResponse], error) {
	return connect.NewResponse(&v1.ResidencyResponse{
		Region: "us", Rows: v.rows, Query: postgres.ResidencySQL, Parameters: postgres.ResidencyParameters("us", []string{"eu", "us"}),
		Verified: []*v1.VerifiedType{{Peer: "eu", Type: "Package", VerifiedThrough: aTime, FinishedAt: aTime}, {Peer: "ap", Type: "Package", FinishedAt: aTime, Differences: 2}},
	}), nil
}

// against runs a command with a server.
func against(t *testing.T, v *verification, args ...string) (out string, err error) {
	mux := http.NewServeMux()
	mux.Handle(dbcontrollerv1connect.NewVerificationHandler(v))
	s := httptest.NewServer(mux)
	defer s.Close()
	root := newRoot()
	var b bytes.Buffer
	root.SetOut(&b)
	root.SetErr(&b)
	root.SetArgs(append(args, "--server", s.URL))
	err = root.ExecuteContext(t.Context())
	return b.String(), err
}

// The search store of a region is the peer @search.
func TestVerifyShowsDocuments(t *testing.T) {
	g := NewWithT(t)
	v := &verification{answers: []*v1.VerifyResponse{{Peer: "@search", State: "one", Progress: &v1.VerifyProgress{Compared: 20, Differences: 2, Repaired: 1, Finished: true},
		Differences: []*v1.RowDifference{
			{Name: "sections/a", Type: "Section", Kind: "missing", OwnerVersion: "1.5", Action: "write the document anew from its row", Repaired: true},
			{Name: "sections/b", Type: "Section", Kind: "extra", CopyVersion: "1.2", Action: "delete the document"}}}}}
	out, err := against(t, v, "verify", "--peer", "@search", "--repair", "--apply")
	g.Expect(v.asked[0].GetPeers()).To(Equal([]string{"@search"}))
	g.Expect(err).To(MatchError("1 copies or search documents are not what they are made of; what is said of each tells why it was left"))
	g.Expect(out).To(HavePrefix(`missing  sections/a of @search: row 1.5, document none; repaired: write the document anew from its row
extra    sections/b of @search: row none, document 1.2; delete the document
@search: 20 rows compared, 2 differences, 1 repaired
`))
}

func TestVerifyShowsDifferencesAndWhatWasDone(t *testing.T) {
	g := NewWithT(t)
	v := &verification{answers: []*v1.VerifyResponse{
		{Peer: "eu", State: "one", Progress: &v1.VerifyProgress{Done: 20, Total: 80, Compared: 20, Differences: 1, RowsPerSecond: 10, Eta: durationpb.New(6 * time.Second)},
			Differences: []*v1.RowDifference{{Name: "sections/a", Type: "Section", Kind: "content", OwnerVersion: "1.5", CopyVersion: "1.5", Action: "write the owner's row over the copy"}}},
		{Peer: "eu", State: "two", Progress: &v1.VerifyProgress{Done: 80, Total: 80, Compared: 80, Differences: 1, Finished: true}},
		{Peer: "ap", State: "three", Progress: &v1.VerifyProgress{Compared: 3, Finished: true, VerifiedThrough: aTime}},
	}}
	out, err := against(t, v, "verify", "--repair", "--type", "Section", "--rate", "100")
	e, ok := errors.AsType[exitError](err)
	g.Expect(ok).To(BeTrue(), "%v", err)
	g.Expect(e.code).To(Equal(exitDiffers))
	g.Expect(err).To(MatchError("1 copies are not what their owners have; --repair --apply does it"))
	g.Expect(out).To(Equal(`content  sections/a of eu: owner 1.5, copy 1.5; write the owner's row over the copy
eu: 25%, 20 rows compared, 10 rows/s, 1 differences, 0 to look at again, 6s left
ap: 3 rows compared, 0 differences, 0 repaired; verified through 2026-11-21T12:00:00Z
eu: 80 rows compared, 1 differences, 0 repaired
`))
	g.Expect(v.asked[0].GetRepair()).To(Equal(v1.RepairMode_REPAIR_MODE_DRY_RUN))
	g.Expect(v.asked[0].GetTypes()).To(Equal([]string{"Section"}))
	g.Expect(v.asked[0].GetRate()).To(Equal(int32(100)))

	_, err = against(t, v, "verify", "--apply")
	_, ok = errors.AsType[usageError](err)
	g.Expect(ok).To(BeTrue(), "%v", err)
}

func TestVerifyIsResumedFromItsFile(t *testing.T) {
	g := NewWithT(t)
	file := filepath.Join(t.TempDir(), "state")
	v := &verification{
		answers: []*v1.VerifyResponse{{Peer: "eu", State: "half", Progress: &v1.VerifyProgress{Done: 1, Total: 2}}},
		err:     connect.NewError(connect.CodeUnavailable, errors.New("the server is stopping")),
	}
	_, err := against(t, v, "verify", "--resume", file)
	g.Expect(err).To(MatchError(ContainSubstring("the same command goes on where it was")))
	v.answers, v.err = []*v1.VerifyResponse{{Peer: "eu", State: "all", Progress: &v1.VerifyProgress{Finished: true, VerifiedThrough: timestamppb.Now()}}}, nil
	_, err = against(t, v, "verify", "--resume", file)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(v.asked[1].GetResume()).To(HaveLen(1))
	g.Expect(v.asked[1].GetResume()[0].GetState()).To(Equal("half"))
	_, err = os.Stat(file)
	g.Expect(err).To(MatchError(os.ErrNotExist))
}

func TestResidencyIsAProofWithItsQuery(t *testing.T) {
	g := NewWithT(t)
	v := &verification{rows: []*v1.ResidentRows{{OwningRegion: "eu", Type: "Package", Count: 7, Example: "sections/a"}}}
	out, err := against(t, v, "residency", "--region", "us")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(out).To(And(ContainSubstring("Forbidden rows: 0\n"), ContainSubstring(postgres.ResidencySQL), ContainSubstring("$3 = {eu,us}"), ContainSubstring("never")))
	v.rows = append(v.rows, &v1.ResidentRows{OwningRegion: "eu", Type: "Package", Reason: "it has left this region", Count: 2, Example: "sections/b"})
	out, err = against(t, v, "residency")
	g.Expect(err).To(MatchError("region us holds 2 rows that it must not hold"))
	g.Expect(out).To(MatchRegexp(`eu +Package +2 +it has left this region +sections/b`))
	_, err = against(t, v, "residency", "--region", "eu")
	g.Expect(err).To(MatchError(ContainSubstring("is an API server of region us, not of eu")))
}
