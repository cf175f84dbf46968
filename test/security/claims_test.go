package security

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/reflect/protoreflect"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/internal/pki"
)

func (w *world) mixin(as key, of key) dbcontrollerv1connect.SchemaMixinClient {
	return dbcontrollerv1connect.NewSchemaMixinClient(w.client(identity(as), of), w.places[of].endpoint)
}

func (w *world) feed(as key, of key) dbcontrollerv1connect.FeedClient {
	return dbcontrollerv1connect.NewFeedClient(w.client(identity(as), of), w.places[of].endpoint)
}

// S3: a region with a valid certificate speaks for another one, in every method that names a caller. It is denied, with the words for a stranger, and nothing changes.
func TestAPeerSpeaksForAnother(t *testing.T) {
	w := newWorld(t, config{only: []key{packagesEU}, unmanaged: true})
	p := w.places[packagesEU]
	w.save(packagesEU, "regions/eu/mirrors/m", `{"n":1}`)
	stranger := w.ask(t, w.client(pki.Identity{TrustDomain: domain, Service: packages, Region: "mars"}, packagesEU), method(t, "SchemaMixin/ConfirmBlockades"), nil)
	before := p.rows(t)
	us := w.client(identity(packagesUS), packagesEU)
	asked := 0
	for _, m := range methods(t) {
		if f := m.Input().Fields(); f.ByName("call") == nil && f.ByName("peer") == nil {
			continue
		}
		for _, claimed := range []key{packagesEU, libraryEU, {Service: packages, Region: "ap"}, {Service: packages, Region: "mars"}, {Service: library, Region: "us"}, {}} {
			asked++
			a := w.ask(t, us, m, message(m, claimed, "regions/eu/mirrors/m"))
			if !a.denied() || !m.IsStreamingServer() && a != stranger {
				t.Errorf("%s as %v answers %v, a stranger gets %v", path(m), claimed, a, stranger)
			}
		}
	}
	if asked < 60 {
		t.Errorf("asked %d times only", asked)
	}
	// A write that is forwarded is the forwarding region's own.
	for _, name := range []string{"Create", "Update", "Delete", "BatchWrite", "Explain"} {
		m := method(t, "Resources/"+name)
		if a := w.ask(t, us, m, message(m, packagesUS, "regions/eu/mirrors/m"), v1.ForwardedByHeader, "ap"); !a.denied() {
			t.Errorf("%s forwarded for ap answers %v", name, a)
		}
	}
	if after := p.rows(t); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("tables are\n%v, were\n%v", after, before)
	}
}

func method(t *testing.T, short string) protoreflect.MethodDescriptor {
	t.Helper()
	for _, m := range methods(t) {
		if strings.HasSuffix(path(m), "."+short) {
			return m
		}
	}
	t.Fatalf("no method %s", short)
	return nil
}

// S3: a region speaks for itself, of what is not its own: confirmations of another's transaction, owners that are another's, rows that it should not have.
func TestAPeerClaimsWhatIsNotItsOwn(t *testing.T) {
	w := newWorld(t, config{only: []key{packagesEU, libraryEU}, unmanaged: true})
	p := w.places[packagesEU]
	const mirror, draft, owned = "regions/eu/mirrors/m", "tenants/t/drafts/d", "regions/eu/mirrors/owned"
	w.save(packagesEU, mirror, `{"n":1}`)
	w.save(packagesEU, "tenants/t", `{"policy":{"enabledRegions":["eu","us"],"defaultControlRegion":"eu"}}`)
	w.save(packagesEU, draft, `{"secret":true}`)
	w.save(packagesEU, owned, fmt.Sprintf(`{"metadata":{"ownerReferences":[
		{"kind":"%[1]s/Mirror","version":"v1","name":"regions/us/mirrors/o","region":"us"},
		{"kind":"%[2]s/Book","version":"v1","name":"books/o","region":"eu"}]}}`, packages, library))
	const tx = "6c3f4c2e-9d2b-4a51-8f0d-0d2a7d2f9d11"
	_, err := w.mixin(libraryEU, packagesEU).EstablishReferences(t.Context(), connect.NewRequest(&v1.EstablishReferencesRequest{
		Call: call(libraryEU, packagesEU), Referrer: "books/b", TxId: tx, TxAttempt: 1, Targets: []*v1.NewReference{{Name: mirror, Blocking: true}}}))
	check(t, err)
	before := p.rows(t)
	same := func(when string, tables ...string) {
		t.Helper()
		after := p.rows(t)
		for _, table := range tables {
			if after[table] != before[table] || before[table] == "" {
				t.Errorf("%s: table %s is %q, was %q", when, table, after[table], before[table])
			}
		}
	}
	us := w.mixin(packagesUS, packagesEU)

	_, err = us.ConfirmBlockades(t.Context(), connect.NewRequest(&v1.ConfirmBlockadesRequest{
		Call: call(packagesUS, packagesEU), References: []*v1.ConfirmedReference{{Referrer: "books/b", Name: mirror, Blocking: true, TxId: tx}}}))
	check(t, err) // it is its own reference that it confirms
	same("us confirms the transaction of library", "resources", "blockades")
	if status, text := w.rest(w.client(alice, packagesEU), packagesEU, "DELETE", "/"+mirror, ""); status == http.StatusOK {
		t.Errorf("the target of an open transaction was deleted: %s", text)
	}
	before = p.rows(t)

	owner := []*v1.Spelling{{Version: "v1", Name: "books/o"}}
	for situation, req := range map[string]*v1.RemoveMetaOwnerReferenceRequest{
		"the owner of another service": {OwnerKind: library + "/Book", OwnerRegion: "eu"},
		"of another region":            {OwnerKind: packages + "/Mirror", OwnerRegion: "eu"},
		"of a service without a type":  {OwnerKind: packages, OwnerRegion: "us"},
		"which it is not, by its name": {OwnerKind: packages + "/Mirror", OwnerRegion: "us"},
	} {
		req.Call, req.Ownee, req.Owner = call(packagesUS, packagesEU), &v1.Spelling{Version: "v1", Name: owned}, owner
		_, err = us.RemoveMetaOwnerReference(t.Context(), connect.NewRequest(req))
		if refused := connect.CodeOf(err) == connect.CodeInvalidArgument; refused != (situation != "which it is not, by its name") {
			t.Errorf("us removes %s: %v", situation, err)
		}
		same("us removes an owner that is "+situation, "resources", "refs", "sources", "blockades")
	}
	// It renames its own owner to that of library, which would then be gone.
	_, err = us.UpgradeMetaOwnerVersion(t.Context(), connect.NewRequest(&v1.UpgradeMetaOwnerVersionRequest{
		Call: call(packagesUS, packagesEU), Ownee: &v1.Spelling{Version: "v1", Name: owned}, OwnerKind: packages + "/Mirror", OwnerRegion: "us",
		From: &v1.Spelling{Version: "v1", Name: "regions/us/mirrors/o"}, To: &v1.Spelling{Version: "v1", Name: "books/o"}}))
	if connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("us takes the place of library's owner: %v", err)
	}
	same("us takes the place of library's owner", "resources", "refs", "sources", "blockades")

	// A sweep of us says nothing for library.
	_, err = us.ConfirmBlockades(t.Context(), connect.NewRequest(&v1.ConfirmBlockadesRequest{Call: call(packagesUS, packagesEU), CompleteEpoch: 1 << 62}))
	same(fmt.Sprintf("us completes a sweep of an epoch to come (%v)", err), "resources", "refs", "blockades", "sources")

	// Rows that are not for us do not come, however they are asked for.
	feed := w.feed(packagesUS, packagesEU)
	seen := 0
	for _, req := range []*v1.FetchRequest{{Names: []string{draft, mirror}}, {Shards: &v1.Shards{To: ring}}} {
		req.Peer = peer(packagesUS, packagesEU)
		stream, err := feed.Fetch(t.Context(), connect.NewRequest(req))
		check(t, err)
		for stream.Receive() {
			seen += strings.Count(string(stream.Msg().GetRows()), mirror)
			if strings.Contains(string(stream.Msg().GetRows()), draft) || strings.Contains(string(stream.Msg().GetRows()), "secret") {
				t.Errorf("Fetch(%v) sends a draft, which is never copied", req)
			}
		}
		check(t, stream.Err())
	}
	if seen < 2 {
		t.Errorf("the mirror, which us should have, was fetched %d times", seen)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	tail, err := feed.Tail(ctx, connect.NewRequest(&v1.TailRequest{Peer: peer(packagesUS, packagesEU), Shards: &v1.Shards{To: ring}}))
	check(t, err)
	defer tail.Close()
	for first := true; tail.Receive(); first = false {
		rows := string(tail.Msg().GetRows())
		if first {
			w.save(packagesEU, draft, `{"secret":"again"}`)
			w.save(packagesEU, mirror, `{"n":2}`)
		}
		if strings.Contains(rows, draft) {
			t.Error("Tail sends a draft")
		}
		if strings.Contains(rows, mirror) {
			return
		}
	}
	if err := tail.Err(); err != nil && !errors.Is(err, io.EOF) {
		t.Errorf("Tail: %v", err)
	}
}

// S3, S12: the database of us is in the hands of an enemy, who serves rows of eu as if us owned them, at the highest version there is, and as deleted. eu keeps its own, in
// contents and in version, its users can go on writing them, and what us does own is still copied.
func TestARegionServesForgedRows(t *testing.T) {
	w := newWorld(t, config{only: []key{packagesEU, packagesUS}})
	eu, us := w.places[packagesEU], w.places[packagesUS]
	for _, name := range []string{"sections/changed", "sections/deleted", "sections/claimed"} {
		w.save(packagesEU, name, `{"by":"eu"}`)
	}
	w.save(packagesUS, "regions/us/mirrors/before", `{"by":"us"}`)
	has := func(of key, name, what string) {
		t.Helper()
		eventually(t, time.Minute, fmt.Sprintf("%s has %s", of, name), func() error {
			if status, text := w.rest(w.client(alice, of), of, "GET", "/"+name, ""); status != http.StatusOK || !strings.Contains(text, what) {
				return fmt.Errorf("%d %s", status, text)
			}
			return nil
		})
	}
	has(packagesUS, "sections/claimed", `"eu"`)
	has(packagesUS, "sections/deleted", `"eu"`)
	has(packagesUS, "sections/changed", `"eu"`)
	has(packagesEU, "regions/us/mirrors/before", `"us"`)
	own := func() string {
		conn := eu.connect(t)
		defer conn.Close(context.Background())
		var text string
		check(t, conn.QueryRow(t.Context(), "SELECT string_agg(r::text, E'\\n' ORDER BY name) FROM v1.resources r WHERE name LIKE 'sections/%'").Scan(&text))
		return text
	}
	before := own()

	const forge = "UPDATE v1.resources SET owning_region = 'us', regions = '{*}', resource_version = 9223372036854775807, change = pg_current_xact_id(), "
	us.exec(t, forge+`body = '{"by":"enemy"}' WHERE name = 'sections/changed'`)
	us.exec(t, forge+`body = NULL, state = 2, delete_time = now() WHERE name = 'sections/deleted'`)
	us.exec(t, "UPDATE v1.resources SET owning_region = 'us', regions = '{*}', change = pg_current_xact_id() WHERE name = 'sections/claimed'")
	// A row of us that was written later has come: so have the forged ones.
	w.save(packagesUS, "regions/us/mirrors/after", `{"by":"us"}`)
	has(packagesEU, "regions/us/mirrors/after", `"us"`)
	if after := own(); after != before {
		t.Errorf("eu has\n%s\nand had\n%s", after, before)
	}
	for _, name := range []string{"sections/changed", "sections/deleted", "sections/claimed"} {
		w.save(packagesEU, name, `{"by":"eu","again":true}`)
		has(packagesEU, name, `"again"`)
	}
}
