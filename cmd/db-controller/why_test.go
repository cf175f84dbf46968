package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"connectrpc.com/connect"
	. "github.com/onsi/gomega"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/internal/pki"
)

var errNoSuch = errors.New("sections/a: does not exist")

func TestExplanationAsText(t *testing.T) {
	owner := &v1.OwnerDecision{Region: "eu", By: v1.OwnerDecision_BY_POLICY_HOLDER, PolicyHolder: "sections/admin", Reason: "the default control region of the policy of sections/admin"}
	held := func(region, version string, epoch int64) *v1.RegionState {
		return &v1.RegionState{Region: region, Expected: true, State: "ACTIVE", ResourceVersion: version, Epoch: epoch, OwningRegion: "eu", UpdateTime: aTime}
	}
	moved, left := held("mv", "10", 2), held("lf", "10", 2)
	moved.OwningRegion, left.Expected = "us", false
	for _, c := range []struct {
		situation   string
		explanation *v1.Explanation
		want        string
	}{
		{"in all regions, each in its own way, with work pending", &v1.Explanation{
			Name: "sections/admin/packages/apt", Type: "Package", Owner: owner, AnsweredBy: "eu", State: "ACTIVE", Uuid: "0190", BlockDeletion: true,
			Regions: []*v1.RegionState{
				held("eu", "10", 2), held("ah", "11", 2), held("be", "9", 2), held("cu", "10", 2), moved, left, held("ol", "99", 1),
				{Region: "dn", Error: "it cannot be reached"},
				{Region: "no"},
				{Region: "qu", Expected: true, Quarantine: &v1.QuarantinedVersion{ResourceVersion: "10", Epoch: 2, Cause: "value too long", Tries: 3}},
			},
			References: []*v1.OutgoingReference{
				{Kind: "parent", Field: "name", Target: "sections/admin", Location: "packages.example.com/eu", OnTargetDeleted: "Block"},
				{Kind: "schema", Field: "key", Target: "projects/p", Location: "secrets.example.com/us", OnTargetDeleted: "Cascade", Unconfirmed: true},
				{Kind: "owner", Field: "metadata.ownerReferences", Target: "sources/apt", Location: "packages.example.com/eu"},
			},
			ReferredFrom: []*v1.IncomingReferences{
				{Location: "packages.example.com/eu", Blocking: true},
				{Location: "apps.example.com/us", Blocking: true, Subscriber: true, Ownee: true},
			},
			Referrers: []*v1.Referrer{{Name: "sections/libs/packages/zlib", Field: "depends[]", OnTargetDeleted: "Block"}}, MoreReferrers: true,
			Blockades: []*v1.Blockade{{Location: "apps.example.com/eu", Referrer: "apps/new", ExpireTime: aTime}},
			PolicyProgress: []*v1.PolicyProgress{
				{Holder: "sections/admin", Round: 1, Total: 200, Checked: 150, Changed: 149, After: "sections/admin/packages/a", Ahead: true, Since: aTime}, {Round: 2, Total: 9, Checked: 12},
			},
			Pending: &v1.PendingWork{State: "PENDING", Tasks: []string{"CONFIRM_BLOCKADES", "CHECK_META_OWNERS"}, Since: aTime, LastError: "secrets.example.com/us cannot be reached", NextRetry: aTime},
		}, `
sections/admin/packages/apt

Type          Package
State         ACTIVE
UUID          0190
Owner         eu: the default control region of the policy of sections/admin
Regions       eu  version 10 of epoch 2  owner, 2026-11-21T12:00:00Z
              ah  version 11 of epoch 2  ahead: the owner has lost it, or it changed while all were asked, 2026-11-21T12:00:00Z
              be  version 9 of epoch 2   behind, 2026-11-21T12:00:00Z
              cu  version 10 of epoch 2  current, 2026-11-21T12:00:00Z
              mv  version 10 of epoch 2  says that region us owns it, 2026-11-21T12:00:00Z
              lf  version 10 of epoch 2  left over: on its way out, or a fault, 2026-11-21T12:00:00Z
              ol  version 99 of epoch 1  behind, 2026-11-21T12:00:00Z
              dn  unknown                it cannot be reached
              no  nothing                not meant to be there
              qu  nothing                has not arrived
                                         could not apply version 10 of epoch 2 (3 tries): value too long
Refers to     sections/admin  in packages.example.com/eu  name                      Block
              projects/p      in secrets.example.com/us   key                       Cascade, not confirmed there yet
              sources/apt     in packages.example.com/eu  metadata.ownerReferences  owner
Referred from packages.example.com/eu  blocks the deletion
              apps.example.com/us      blocks the deletion, handles the deletion, is owned
Referrers     sections/libs/packages/zlib  depends[]  Block
              and more
Blockades     apps/new  of apps.example.com/eu  a write that may not have ended, until 2026-11-21T12:00:00Z
Deletion      held up by the service itself
Policy        the policy of sections/admin is being carried out since 2026-11-21T12:00:00Z
              round 1: 150 of 200 resources looked at in all, 149 changed; this one is still to come
              the policy of the service is being carried out
              round 2: 12 of 9 resources looked at in all, 0 changed
Pending       CONFIRM_BLOCKADES, CHECK_META_OWNERS, since 2026-11-21T12:00:00Z
              last error: secrets.example.com/us cannot be reached
              next retry: 2026-11-21T12:00:00Z
Next          region dn: ask it alone, with --local and its own --server
              region qu: remove the cause there; the next version of the resource is tried again
              nothing: it is tried again by itself, once the error above is cured
`},
		{"a deleted name that is not free yet", &v1.Explanation{
			Name: "sections/admin", Type: "Section", Owner: owner, AnsweredBy: "eu", State: "GONE", Uuid: "0190", DeleteTime: aTime,
			Regions: []*v1.RegionState{{Region: "eu"}, {Region: "us", State: "ACTIVE", ResourceVersion: "3", Epoch: 1, OwningRegion: "eu"}},
			ReferredFrom: []*v1.IncomingReferences{
				{Location: "apps.example.com/eu", Blocking: true}, {Location: "apps.example.com/us", Subscriber: true, Awaited: true}, {Location: "tools.example.com/ap", Awaited: true},
			},
			Pending: &v1.PendingWork{State: "DELETING", Since: aTime, LastError: "3 references at apps.example.com/us are not handled yet"},
		}, `
sections/admin

Type          Section
State         deleted, and the name is still taken since 2026-11-21T12:00:00Z
UUID          0190
Owner         eu: the default control region of the policy of sections/admin
Regions       eu  nothing               owner, which has none
              us  version 3 of epoch 1  left over: on its way out, or a fault
Referred from apps.example.com/eu   blocks the deletion
              apps.example.com/us   handles the deletion  the deletion waits for it
              tools.example.com/ap  may refer to it       the deletion waits for it
Pending       finish the deletion, since 2026-11-21T12:00:00Z
              last error: 3 references at apps.example.com/us are not handled yet
Next          the name is free when nothing in apps.example.com/us, tools.example.com/ap refers to it any more
`},
		{"one region alone, which does not know the owner's state", &v1.Explanation{
			Name: "sections/admin", Type: "Section", Owner: &v1.OwnerDecision{Reason: "its policy holder is missing"}, AnsweredBy: "us", Regions: []*v1.RegionState{held("us", "3", 1)},
		}, `
sections/admin

Type          Section
State         not in region us
Owner         unknown: its policy holder is missing
Regions       us  version 3 of epoch 1  not compared with the owner, 2026-11-21T12:00:00Z
`},
	} {
		t.Run(c.situation, func(t *testing.T) {
			var out bytes.Buffer
			if err := writeWhy(&out, c.explanation); err != nil {
				t.Fatal(err)
			}
			if got := "\n" + out.String(); got != c.want {
				t.Errorf("got:%s\nwant:%s", got, c.want)
			}
		})
	}
}

func TestWhyCommand(t *testing.T) {
	g := NewWithT(t)
	f := &fakeServer{explanation: &v1.Explanation{Name: "sections/a", Type: "Section"}}
	url := serveFake(t, f)

	code, out, errs := command(t, "why", "--server", url, "--local", "sections/a")
	g.Expect(code).To(Equal(0), errs)
	g.Expect(out).To(HavePrefix("sections/a\n"))
	g.Expect(f.local.Load()).To(BeTrue())

	_, out, _ = command(t, "why", "--server", url, "-o", "json", "sections/a")
	g.Expect(out).To(ContainSubstring(`"name": "sections/a"`))

	for _, c := range []struct {
		situation string
		err       error
		args      []string
		code      int
		want      string
	}{
		{"unknown name", connect.NewError(connect.CodeNotFound, errNoSuch), nil, 1, "sections/a: does not exist\n"},
		{"owner away", connect.NewError(connect.CodeUnavailable, errors.New("region eu does not answer: ask with local_only")), nil, 1, "local_only (--local)\n"},
		{"not allowed", connect.NewError(connect.CodePermissionDenied, errors.New("permission denied")), nil, 1, "with --cert and --key\n"},
		{"nobody there", nil, []string{"--server", "http://127.0.0.1:1"}, 1, "Name one with --server\n"},
		{"no URL", nil, []string{"--server", "eu"}, 2, `--server "eu": is no URL`},
		{"no such output", nil, []string{"-o", "yaml"}, 2, `"yaml": is neither text nor json`},
		{"half a certificate", nil, []string{"--cert", "me.crt"}, 2, "belong together"},
		{"no certificate in the file", nil, []string{"--cacert", os.Args[0]}, 1, "no certificate in"},
	} {
		url := serveFake(t, &fakeServer{explanation: f.explanation, err: c.err})
		code, _, errs := command(t, append([]string{"why", "--server", url, "sections/a"}, c.args...)...)
		g.Expect(code).To(Equal(c.code), c.situation)
		g.Expect(errs).To(ContainSubstring(c.want), c.situation)
	}
}

// The server wants a certificate; the environment gives it.
func TestWhyOverTLS(t *testing.T) {
	g := NewWithT(t)
	ca, err := pki.NewCA("test")
	g.Expect(err).NotTo(HaveOccurred())
	url := serveTLS(t, &fakeServer{explanation: &v1.Explanation{Name: "sections/a"}}, ca)
	user, err := ca.User("example.org", "alice")
	g.Expect(err).NotTo(HaveOccurred())
	dir := t.TempDir()
	for name, text := range map[string][]byte{"crt": user.CertPEM, "key": user.KeyPEM, "ca": ca.CertPEM()} {
		g.Expect(os.WriteFile(filepath.Join(dir, name), text, 0o600)).To(Succeed())
	}

	code, _, errs := command(t, "why", "--server", url, "--cacert", dir+"/ca", "sections/a")
	g.Expect(code).To(Equal(1))
	g.Expect(errs).To(ContainSubstring("--cert and --key"))

	for name, value := range map[string]string{"DBC_SERVER": url, "DBC_CERT": dir + "/crt", "DBC_KEY": dir + "/key", "DBC_CACERT": dir + "/ca"} {
		t.Setenv(name, value)
	}
	code, out, errs := command(t, "why", "sections/a")
	g.Expect(code).To(Equal(0), errs)
	g.Expect(out).To(HavePrefix("sections/a\n"))
}
