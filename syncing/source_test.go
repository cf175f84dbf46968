package syncing

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/genproto/googleapis/rpc/errdetails"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/row"
)

func TestErrorsAreClassified(t *testing.T) {
	lost := connect.NewError(connect.CodeFailedPrecondition, errors.New("gone"))
	detail, err := connect.NewErrorDetail(&errdetails.ErrorInfo{Domain: v1.ErrorDomain, Reason: v1.ReasonCursorLost})
	if err != nil {
		t.Fatal(err)
	}
	lost.AddDetail(detail)
	rpc := func(c connect.Code) error { return classify("tail", connect.NewError(c, errors.New("x"))) }
	for _, tc := range []struct {
		name string
		err  error
		want Reason
	}{
		{"nobody listens", rpc(connect.CodeUnavailable), Unreachable},
		{"too slow", rpc(connect.CodeDeadlineExceeded), Unreachable},
		{"unknown to the peer", rpc(connect.CodePermissionDenied), Denied},
		{"no certificate", rpc(connect.CodeUnauthenticated), Denied},
		{"older server", rpc(connect.CodeUnimplemented), Unimplemented},
		{"another Deployment", rpc(connect.CodeFailedPrecondition), WrongPeer},
		{"history gone", classify("tail", lost), CursorLost},
		{"server's bug", rpc(connect.CodeInternal), PeerFailed},
		{"certificate of another", classify("ping", connect.NewError(connect.CodeUnavailable, identityError{errors.New("server is ap")})), WrongIdentity},
		{"rows of an ended epoch", fmt.Errorf("apply: %w", postgres.ErrStaleEpoch), CursorLost},
		{"forged rows", fmt.Errorf("apply: %w", row.ErrMalformed), Malformed},
		{"own database down", errors.New("connection refused"), ApplyFailed},
	} {
		if got := reasonOf(tc.err); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, got, tc.want)
		}
		var s *SourceError
		if errors.As(tc.err, &s) && errors.Is(tc.err, feed.ErrCursorLost) != (tc.want == CursorLost) {
			t.Errorf("%s: is ErrCursorLost: %v", tc.name, errors.Is(tc.err, feed.ErrCursorLost))
		}
	}
}

func TestStatusAsJSON(t *testing.T) {
	b, err := json.Marshal(PeerStatus{Service: "s", Region: "eu", State: Live, Freshness: new(1500 * time.Millisecond)})
	if err != nil {
		t.Fatal(err)
	}
	want := `{"service":"s","region":"eu","state":"Live","contactAgeSeconds":null,"freshnessSeconds":1.5,"applyLagSeconds":null,"pendingRows":0,` +
		`"rowsApplied":0,"quarantined":0,"progress":0,"clockOffsetSeconds":null,"suspended":false}`
	if string(b) != want {
		t.Errorf("got %s\nwant %s", b, want)
	}
}
