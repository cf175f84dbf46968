package main

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	. "github.com/onsi/gomega"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/internal/pki"
)

var aTime = timestamppb.New(time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC))

func TestPlanAsText(t *testing.T) {
	packages := &v1.PlannedDeployment{Location: "packages.example.com/eu", Deletes: 4, Unsets: 1, Asynchronous: 1, Changes: []*v1.PlannedChange{
		{Name: "sections/admin", Type: "Section"},
		{Name: "sections/admin/packages/apt", Type: "Package", Field: "name", Target: "sections/admin"},
		{Name: "sections/admin/packages/dpkg", Type: "Package", Field: "name", Target: "sections/admin"},
		{Name: "sections/admin/packages/apt/builds/1", Type: "Build", Field: "package", Target: "sections/admin/packages/apt", Asynchronous: true},
		{Name: "sections/libs/packages/zlib", Type: "Package", Field: "suggests[]", Target: "sections/admin/packages/apt", Unset: true},
	}}
	apps := &v1.PlannedDeployment{Location: "apps.example.com/us", Deletes: 1, Unsets: 1, Asynchronous: 2, Changes: []*v1.PlannedChange{
		{Name: "apps/shop", Type: "App", Field: "package", Target: "sections/admin/packages/apt", Asynchronous: true},
		{Name: "apps/blog", Type: "App", Field: "next", Target: "apps/shop", Unset: true, Asynchronous: true},
	}}
	for _, c := range []struct {
		situation string
		plan      *v1.DeletionPlan
		want      string
	}{
		{"accepted, in two Deployments", &v1.DeletionPlan{Deployments: []*v1.PlannedDeployment{packages, apps}, Ownees: []string{"apps.example.com/eu"}}, `
packages.example.com/eu
└── sections/admin (Section)
    ├── sections/admin/packages/apt (Package), through its parent
    │   ├── sections/admin/packages/apt/builds/1 (Build), through package, afterwards
    │   └── clears suggests[] of sections/libs/packages/zlib (Package)
    └── sections/admin/packages/dpkg (Package), through its parent

apps.example.com/us
└── apps/shop (App), through package: sections/admin/packages/apt, afterwards
    └── clears next of apps/blog (App), afterwards

Deletes       5
Clears        2
Afterwards    3 of both: not in the transaction of the deletion
Ownees        not counted: resources in apps.example.com/eu lose an owner, and go if it was the last
Next          DELETE IT
`},
		{"refused by blockers, with one who was not asked", &v1.DeletionPlan{
			Refused: true, Truncated: true, Deployments: []*v1.PlannedDeployment{{Location: "packages.example.com/eu", Deletes: 1, Changes: packages.Changes[:1]}},
			Blockers: []*v1.PlannedBlocker{
				{Target: "sections/admin", Location: "packages.example.com/eu", Referrer: "sections/admin/packages/apt", Field: "name"},
				{Target: "sections/admin", Location: "apps.example.com/us"},
				{Target: "sections/admin", Location: "apps.example.com/us", Referrer: "apps/new", TentativeUntil: aTime},
				{Target: "sections/admin", Location: "packages.example.com/eu", BlockDeletion: true},
				{Target: "apps/shop", Location: "apps.example.com/us", Referrer: "apps/blog", Asynchronous: true},
			},
			Unasked: []*v1.UnaskedDeployment{{Location: "tools.example.com/ap", Names: 3, Error: "it cannot be reached"}},
		}, `
packages.example.com/eu
└── sections/admin (Section)

Deletes       1
Clears        0
Cut short     there is more than is shown
Refused by    sections/admin  sections/admin/packages/apt (name) in packages.example.com/eu refers to it
              sections/admin  a resource in apps.example.com/us refers to it
              sections/admin  apps/new in apps.example.com/us is being written and may refer to it, until 2026-11-21T12:00:00Z
              sections/admin  its service holds up the deletion
Held up by    apps/shop  apps/blog in apps.example.com/us refers to it
Not asked     tools.example.com/ap  about 3 resources  it cannot be reached
Next          delete what refuses it, or remove the references from it, and plan again
`},
		{"refused by a write that is under way", &v1.DeletionPlan{Refused: true, Blockers: []*v1.PlannedBlocker{{Target: "sections/admin", Location: "a/b", Referrer: "apps/new", TentativeUntil: aTime}}}, `
Deletes       0
Clears        0
Refused by    sections/admin  apps/new in a/b is being written and may refer to it, until 2026-11-21T12:00:00Z
Next          wait until those writes have ended, and plan again
`},
		{"a resource that is being deleted", &v1.DeletionPlan{}, `
Deletes       0
Clears        0
Next          nothing: sections/admin is being deleted already; see db-controller why sections/admin
`},
	} {
		t.Run(c.situation, func(t *testing.T) {
			var out bytes.Buffer
			if err := writePlan(&out, "sections/admin", c.plan, "DELETE IT"); err != nil {
				t.Fatal(err)
			}
			if got := "\n" + out.String(); got != c.want {
				t.Errorf("got:%s\nwant:%s", got, c.want)
			}
		})
	}
}

// fakeServer answers with what a test sets before it serves.
type fakeServer struct {
	dbcontrollerv1connect.UnimplementedResourcesHandler
	plan        *v1.DeletionPlan
	explanation *v1.Explanation
	err         error
	local       atomic.Bool // what the last Explain asked for
}

func (f *fakeServer) Delete(_ context.Context, req *connect.Request[v1.DeleteRequest]) (*connect.Response[v1.DeleteResponse], error) {
	if !req.Msg.GetValidateOnly() {
		panic("a plan must not delete")
	}
	return connect.NewResponse(&v1.DeleteResponse{Plan: f.plan}), f.err
}

func (f *fakeServer) Explain(_ context.Context, req *connect.Request[v1.ExplainRequest]) (*connect.Response[v1.Explanation], error) {
	f.local.Store(req.Msg.GetLocalOnly())
	return connect.NewResponse(f.explanation), f.err
}

// command runs db-controller as users do.
func command(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	_ = cmd.Run() // the code says it
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

func serveFake(t *testing.T, f *fakeServer) string {
	t.Helper()
	mux := http.NewServeMux()
	mux.Handle(dbcontrollerv1connect.NewResourcesHandler(f))
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s.URL
}

func serveTLS(t *testing.T, f *fakeServer, ca *pki.CA) string {
	t.Helper()
	pair, err := ca.Deployment("example.org", "packages.example.com", "eu", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	source, err := pki.Static(pair, ca.CertPEM())
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(dbcontrollerv1connect.NewResourcesHandler(f))
	s := httptest.NewUnstartedServer(mux)
	s.TLS = pki.ServerTLS(source, "example.org")
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL
}

func TestPlanDeleteCommand(t *testing.T) {
	g := NewWithT(t)
	there := []*v1.PlannedDeployment{{Location: "a/eu", Deletes: 1, Changes: []*v1.PlannedChange{{Name: "sections/a", Type: "Section"}}}}
	url := serveFake(t, &fakeServer{plan: &v1.DeletionPlan{Deployments: there}})

	code, out, errs := command(t, "plan-delete", "--server", url, "sections/a")
	g.Expect(code).To(Equal(0), errs)
	g.Expect(out).To(HaveSuffix("Next          curl -H 'Content-Type: application/json' -d '{\"name\":\"sections/a\"}' " + url + "/dbcontroller.v1.Resources/Delete\n"))

	code, out, _ = command(t, "plan-delete", "--server", url, "-o", "json", "sections/a")
	g.Expect(code).To(Equal(0))
	var plan map[string]any
	g.Expect(json.Unmarshal([]byte(out), &plan)).To(Succeed())
	g.Expect(plan).To(HaveKeyWithValue("refused", false))

	url = serveFake(t, &fakeServer{plan: &v1.DeletionPlan{Deployments: there, Refused: true}})
	code, out, errs = command(t, "plan-delete", "--server", url, "sections/a")
	g.Expect(code).To(Equal(3))
	g.Expect(out).To(ContainSubstring("plan again"))
	g.Expect(errs).To(ContainSubstring("the deletion of sections/a would be refused"))

	url = serveFake(t, &fakeServer{err: connect.NewError(connect.CodeNotFound, errNoSuch)})
	code, _, errs = command(t, "plan-delete", "--server", url, "sections/a")
	g.Expect(code).To(Equal(1))
	g.Expect(errs).To(Equal("db-controller plan-delete: sections/a: does not exist\n"))

	code, _, errs = command(t, "plan-delete")
	g.Expect(code).To(Equal(2))
	g.Expect(errs).To(ContainSubstring("want one argument"))
	_, out, _ = command(t, "plan-delete", "--help")
	g.Expect(out).To(SatisfyAll(ContainSubstring("3 if it would be refused"), ContainSubstring("Examples:")))
}

func TestQuote(t *testing.T) {
	if got := strings.Join([]string{quote("a/b.crt"), quote("my key"), quote("o'k"), quote("")}, " "); got != `a/b.crt 'my key' 'o'\''k' ` {
		t.Error(got)
	}
}
