package security

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/internal/pki"
)

// methods are all methods of all services of the protocol, wherever they are declared: one that is added is found here without being named.
func methods(t *testing.T) (all []protoreflect.MethodDescriptor) {
	t.Helper()
	protoregistry.GlobalFiles.RangeFilesByPackage("dbcontroller.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			for j := range f.Services().Get(i).Methods().Len() {
				all = append(all, f.Services().Get(i).Methods().Get(j))
			}
		}
		return true
	})
	if len(all) < 30 {
		t.Fatalf("only %d methods are registered", len(all))
	}
	return all
}

func path(m protoreflect.MethodDescriptor) string {
	return "/" + string(m.Parent().FullName()) + "/" + string(m.Name())
}

// message is a request of a method that says it is of from, to packages in eu, and that names the resource wherever it names one.
func message(m protoreflect.MethodDescriptor, from key, resource string) []byte {
	msg := dynamicpb.NewMessage(m.Input())
	fill(msg, from, resource, 3)
	b, err := proto.Marshal(msg)
	if err != nil {
		panic(err)
	}
	return b
}

// fill sets the fields of a message to what a caller would send.
func fill(msg protoreflect.Message, from key, resource string, depth int) {
	for i := range msg.Descriptor().Fields().Len() {
		f := msg.Descriptor().Fields().Get(i)
		var v protoreflect.Value
		switch {
		case f.IsMap() || f.ContainingOneof() != nil:
			continue
		case f.Message() != nil && f.Message().FullName() == "dbcontroller.v1.Call":
			v = protoreflect.ValueOfMessage(call(from, packagesEU).ProtoReflect())
		case f.Message() != nil && f.Message().FullName() == "dbcontroller.v1.Peer":
			v = protoreflect.ValueOfMessage(peer(from, packagesEU).ProtoReflect())
		case f.Message() != nil && f.Message().FullName() == "dbcontroller.v1.Shards":
			v = protoreflect.ValueOfMessage((&v1.Shards{To: ring}).ProtoReflect())
		case f.Message() != nil && depth > 0 && strings.HasPrefix(string(f.Message().FullName()), "dbcontroller.v1."):
			sub := msg.NewField(f)
			if f.IsList() {
				e := sub.List().NewElement()
				fill(e.Message(), from, resource, depth-1)
				sub.List().Append(e)
			} else {
				fill(sub.Message(), from, resource, depth-1)
			}
			v = sub
		case f.Kind() == protoreflect.StringKind:
			text := map[string]string{
				"body": `{}`, "collection": "sections", "version": "v1", "owner_kind": packages + "/Section", "ownee_kind": packages + "/Section", "region": "us", "owner_region": "us",
				"tx_id": "6c3f4c2e-9d2b-4a51-8f0d-0d2a7d2f9d11", "uuid": "6c3f4c2e-9d2b-4a51-8f0d-0d2a7d2f9d11",
			}[string(f.Name())]
			if text == "" && !strings.Contains(string(f.Name()), "token") && !strings.Contains(string(f.Name()), "etag") && f.Name() != "filter" && f.Name() != "order_by" && f.Name() != "cursor" {
				text = resource
			}
			if v = protoreflect.ValueOfString(text); f.IsList() {
				list := msg.NewField(f)
				list.List().Append(v)
				v = list
			}
		case f.Name() == "tx_attempt":
			v = protoreflect.ValueOfInt32(1)
		default:
			continue
		}
		msg.Set(f, v)
	}
}

// answer is the whole of what a caller sees, but for dates.
type answer struct {
	status int
	text   string
}

// ask calls a method with Connect's own protocol, whose errors are text that can be compared. A stream that begins counts as an answer.
func (w *world) ask(t *testing.T, c *http.Client, m protoreflect.MethodDescriptor, body []byte, header ...string) answer {
	t.Helper()
	contentType := "application/proto"
	if m.IsStreamingServer() {
		contentType = "application/connect+proto"
		body = append([]byte{0, byte(len(body) >> 24), byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if m.IsStreamingServer() {
		return w.askStream(ctx, t, c, m, body, contentType, header...)
	}
	status, text, err := request(ctx, c, "POST", w.places[packagesEU].endpoint+path(m), body, contentType, header...)
	check(t, err)
	return answer{status, text}
}

// askStream returns the first message of a stream if that ends it, and else that there is one.
func (w *world) askStream(ctx context.Context, t *testing.T, c *http.Client, m protoreflect.MethodDescriptor, body []byte, contentType string, header ...string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, "POST", w.places[packagesEU].endpoint+path(m), strings.NewReader(string(body)))
	check(t, err)
	req.Header.Set("Content-Type", contentType)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := c.Do(req)
	check(t, err)
	defer res.Body.Close()
	head := make([]byte, 5)
	if _, err := io.ReadFull(res.Body, head); err != nil {
		return answer{res.StatusCode, "the stream begins, and says nothing"}
	}
	if head[0]&2 == 0 {
		return answer{res.StatusCode, "the stream begins"}
	}
	text := make([]byte, int(head[1])<<24|int(head[2])<<16|int(head[3])<<8|int(head[4]))
	_, err = io.ReadFull(res.Body, text)
	check(t, err)
	return answer{res.StatusCode, string(text)}
}

func (a answer) denied() bool { return strings.Contains(a.text, `"code":"permission_denied"`) }

// S2: all methods by all who have a valid certificate and no business there. The answer is the same bytes whatever is asked for, so that nobody learns what exists.
// Who may call what, method by method, is apiserver's test "Access".
func TestStrangersLearnNothing(t *testing.T) {
	w := newWorld(t, config{only: []key{packagesEU}, unmanaged: true})
	p := w.places[packagesEU]
	w.save(packagesEU, "sections/there", `{"n":1}`)
	strangers := []struct {
		situation string
		id        pki.Identity
		says      key // whom the message names
		forwards  string
	}{
		{"a region that is not declared", pki.Identity{TrustDomain: domain, Service: packages, Region: "mars"}, key{Service: packages, Region: "mars"}, "mars"},
		{"a service that is not declared", pki.Identity{TrustDomain: domain, Service: "evil.example.com", Region: "us"}, key{Service: "evil.example.com", Region: "us"}, ""},
		{"a Deployment that is disabled", pki.Identity{TrustDomain: domain, Service: packages, Region: "off"}, key{Service: packages, Region: "off"}, "off"},
		{"a stranger who says that it is a peer", pki.Identity{TrustDomain: domain, Service: packages, Region: "mars"}, packagesUS, "us"},
		{"a stranger who says that it is us ourselves", pki.Identity{TrustDomain: domain, Service: packages, Region: "mars"}, packagesEU, "eu"},
		{"a user who says that he forwards", alice, packagesUS, "us"},
	}
	before := p.rows(t)
	for _, s := range strangers {
		t.Run(s.situation, func(t *testing.T) {
			client := w.client(s.id, packagesEU)
			var header []string
			if s.forwards != "" {
				header = []string{v1.ForwardedByHeader, s.forwards}
			}
			denials := map[string]string{} // text, by whether it is a stream
			for _, m := range methods(t) {
				there := w.ask(t, client, m, message(m, s.says, "sections/there"), header...)
				missing := w.ask(t, client, m, message(m, s.says, "sections/missing"), header...)
				if !there.denied() || there != missing {
					t.Errorf("%s answers %v for what exists, and %v for what does not; want the same denial", path(m), there, missing)
				}
				kind := fmt.Sprint(m.IsStreamingServer())
				if first, ok := denials[kind]; ok && first != there.text {
					t.Errorf("%s answers %q, others %q", path(m), there.text, first)
				}
				denials[kind] = there.text
			}
		})
	}
	if after := p.rows(t); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("tables are\n%v, were\n%v", after, before)
	}
}

// S2: every method has somebody who may call it, and somebody who may not: a new one without a rule is denied to all, and fails here.
func TestEveryMethodHasARule(t *testing.T) {
	w := newWorld(t, config{only: []key{packagesEU}, unmanaged: true})
	user, us, lib := w.client(alice, packagesEU), w.client(identity(packagesUS), packagesEU), w.client(identity(libraryEU), packagesEU)
	for _, m := range methods(t) {
		byUser := w.ask(t, user, m, message(m, packagesUS, "sections/x"))
		byPeer := w.ask(t, us, m, message(m, packagesUS, "sections/x"))
		byImporter := w.ask(t, lib, m, message(m, libraryEU, "sections/x"))
		var may []string
		for who, a := range map[string]answer{"user": byUser, "peer": byPeer, "importer": byImporter} {
			if strings.Contains(a.text, `"code":"unimplemented"`) || strings.Contains(a.text, "NO_SUCH_PATH") {
				t.Errorf("%s is not served: %v", path(m), a)
			}
			if !a.denied() {
				may = append(may, who)
			}
		}
		if len(may) == 0 || len(may) == 3 {
			t.Errorf("%s may be called by %v: say in apiserver's table of rules, and in its test Access, who may", path(m), may)
		}
	}
}

// S2: certificates that name nobody, or too much, fail in the handshake, for every method alike.
func TestCertificatesThatNameNobody(t *testing.T) {
	w := newWorld(t, config{only: []key{packagesEU}, unmanaged: true})
	for _, c := range badCertificates(t, w.ca) {
		if c.reason != "wrong_identity" {
			continue
		}
		t.Run(c.situation, func(t *testing.T) {
			transport := &http.Transport{TLSClientConfig: c.config, ForceAttemptHTTP2: true}
			defer transport.CloseIdleConnections()
			client := &http.Client{Transport: transport, Timeout: 20 * time.Second}
			for _, m := range methods(t) {
				status, text, err := request(t.Context(), client, "POST", w.places[packagesEU].endpoint+path(m), message(m, packagesUS, "sections/x"), "application/proto")
				if err == nil {
					t.Errorf("%s answers %d %s", path(m), status, text)
				}
			}
		})
	}
}
