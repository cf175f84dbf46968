package security

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/mixin"
)

// tape records whole requests inside of TLS, where only a party to the connection could, and plays them again.
type tape struct {
	next http.RoundTripper

	mu       sync.Mutex
	recorded map[string]*http.Request // by the name of the method; the last
	body     map[string][]byte
}

func (r *tape) RoundTrip(req *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return nil, err
	}
	req.Body = io.NopCloser(bytes.NewReader(body))
	method := req.URL.Path[strings.LastIndexByte(req.URL.Path, '/')+1:]
	r.mu.Lock()
	r.recorded[method], r.body[method] = req.Clone(req.Context()), body
	r.mu.Unlock()
	return r.next.RoundTrip(req)
}

// again plays a recorded call, and returns the answer's status and text.
func (r *tape) again(t *testing.T, method string) (int, string) {
	t.Helper()
	r.mu.Lock()
	req := r.recorded[method].Clone(t.Context())
	req.Body = io.NopCloser(bytes.NewReader(r.body[method]))
	r.mu.Unlock()
	req.Header.Del("Accept-Encoding") // the answer is read here, and not by Connect
	res, err := r.next.RoundTrip(req)
	check(t, err)
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	check(t, err)
	return res.StatusCode, string(text)
}

func (w *world) taped(as, of key) (dbcontrollerv1connect.SchemaMixinClient, *tape) {
	r := &tape{next: w.client(identity(as), of).Transport, recorded: map[string]*http.Request{}, body: map[string][]byte{}}
	return dbcontrollerv1connect.NewSchemaMixinClient(&http.Client{Transport: r}, w.places[of].endpoint), r
}

// S4: the calls of a reference's life, played again when they mean nothing any more. Each is answered as the first time or refused, and none of them frees the target of a
// reference that was made since. Repeats and late arrivals of the protocol's own calls are in mixin's "ends the same however its messages are repeated and reordered" and "keeps
// its blockade when an older transaction is confirmed late", and under faults in test/references.
func TestReplayFreesNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, config{only: []key{packagesEU, libraryEU}})
	p := w.places[packagesEU]
	const mirror = "regions/eu/mirrors/m"
	w.save(packagesEU, mirror, `{"n":1}`)
	toPackages, asked := w.taped(libraryEU, packagesEU)
	toLibrary, asks := w.taped(packagesEU, libraryEU)
	const tx = "6c3f4c2e-9d2b-4a51-8f0d-0d2a7d2f9d11"

	// The first life: a reference is established, confirmed, and gone; the owner asks, and hears that nothing blocks.
	_, err := toPackages.EstablishReferences(t.Context(), connect.NewRequest(&v1.EstablishReferencesRequest{Call: call(libraryEU, packagesEU), Referrer: "books/b",
		TxId: tx, TxAttempt: 1, Ttl: durationpb.New(mixin.MinTTL), Targets: []*v1.NewReference{{Name: mirror, Blocking: true}}}))
	check(t, err)
	_, err = toPackages.ConfirmBlockades(t.Context(), connect.NewRequest(&v1.ConfirmBlockadesRequest{Call: call(libraryEU, packagesEU),
		References: []*v1.ConfirmedReference{{Referrer: "books/b", Name: mirror, Blocking: true, TxId: tx}}}))
	check(t, err)
	questions, err := p.open.Core().BeginAttempt(t.Context(), []string{mirror})
	check(t, err)
	q := questions[mirror]
	answer, err := toLibrary.CheckIfResourceIsBlocked(t.Context(), connect.NewRequest(&v1.CheckIfResourceIsBlockedRequest{Call: call(packagesEU, libraryEU),
		Targets: []*v1.Question{{Name: mirror, Uuid: q.UUID, Epoch: q.Epoch, RowVersion: q.RowVersion}}}))
	check(t, err)
	if answer.Msg.GetAnswers()[0].GetBlocked() {
		t.Fatal("library has no book, and says that one blocks")
	}

	// The second: a real book refers to the mirror.
	w.save(libraryEU, "books/b", `{"mirror":"`+mirror+`"}`)
	drop := func() (int, string) { return w.rest(w.client(alice, packagesEU), packagesEU, "DELETE", "/"+mirror, "") }
	if status, text := drop(); status == http.StatusOK {
		t.Fatalf("the target of a reference was deleted: %s", text)
	}
	for round := range 3 {
		for _, order := range [][]string{{"EstablishReferences", "ConfirmBlockades"}, {"ConfirmBlockades", "EstablishReferences", "ConfirmBlockades"}} {
			for _, m := range order {
				if status, text := asked.again(t, m); status != http.StatusOK && status != http.StatusBadRequest {
					t.Errorf("round %d: %s again = %d %s", round, m, status, text)
				}
			}
		}
		if status, text := asks.again(t, "CheckIfResourceIsBlocked"); status == http.StatusOK {
			res := &v1.CheckIfResourceIsBlockedResponse{}
			check(t, proto.Unmarshal([]byte(text), res))
			if !res.GetAnswers()[0].GetBlocked() {
				t.Errorf("round %d: the question of before is answered as before, though a book refers to the mirror", round)
			}
		}
		if status, text := drop(); status == http.StatusOK {
			t.Fatalf("round %d: after the replay the target of a reference was deleted: %s", round, text)
		}
	}
	if status, text := w.rest(w.client(alice, libraryEU), libraryEU, "GET", "/books/b", ""); status != http.StatusOK || !strings.Contains(text, mirror) {
		t.Errorf("the book is %d %s", status, text)
	}

	// What was played again does not block for ever either.
	if status, text := w.rest(w.client(alice, libraryEU), libraryEU, "DELETE", "/books/b", ""); status != http.StatusOK {
		t.Fatalf("delete the book: %d %s", status, text)
	}
	eventually(t, 3*mixin.MinTTL, "the mirror can be deleted once the book is", func() error {
		if status, text := drop(); status != http.StatusOK {
			return fmt.Errorf("%d %s", status, text)
		}
		return nil
	})
	// And a name that is born again is not the one that was asked about.
	w.save(packagesEU, mirror, `{"n":2}`)
	w.save(libraryEU, "books/c", `{"mirror":"`+mirror+`"}`)
	asks.again(t, "CheckIfResourceIsBlocked")
	asked.again(t, "ConfirmBlockades")
	if status, text := drop(); status == http.StatusOK {
		t.Errorf("after the replay the target of another life's reference was deleted: %s", text)
	}
}

// S4: writes of users that are sent again: a creation finds what it made, a change or deletion of a version finds another.
func TestReplayOfWrites(t *testing.T) {
	w := newWorld(t, config{only: []key{packagesEU}, unmanaged: true})
	c := w.client(alice, packagesEU)
	do := func(method, path, body string, want int) string {
		t.Helper()
		status, text := w.rest(c, packagesEU, method, path, body)
		if status != want {
			t.Errorf("%s %s = %d %s, want %d", method, path, status, text, want)
		}
		return text
	}
	etag := func(text string) string {
		_, rest, _ := strings.Cut(text, `"etag":"`)
		e, _, _ := strings.Cut(rest, `"`)
		return e
	}
	first := etag(do("POST", "/sections?id=s", `{"n":1}`, http.StatusOK))
	do("POST", "/sections?id=s", `{"n":1}`, http.StatusConflict)
	change := fmt.Sprintf(`{"n":2,"etag":%q}`, first)
	second := etag(do("PATCH", "/sections/s", change, http.StatusOK))
	do("PATCH", "/sections/s", change, http.StatusConflict)
	do("DELETE", "/sections/s?etag="+first, "", http.StatusConflict)
	do("DELETE", "/sections/s?etag="+second, "", http.StatusOK)
	do("DELETE", "/sections/s?etag="+second, "", http.StatusConflict)
	do("POST", "/sections?id=s", `{"n":3}`, http.StatusOK)
	do("DELETE", "/sections/s?etag="+second, "", http.StatusConflict)
	if text := do("GET", "/sections/s", "", http.StatusOK); !strings.Contains(text, `"n": 3`) {
		t.Errorf("the section is %s", text)
	}
}
