package e2e

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/internal/kubetest"
	"github.com/dbcontroller/db-controller/test/e2e/cluster"
)

var shellBlock = regexp.MustCompile("(?s)```sh\n(.*?)```")

// TestQuickStartInKubernetes does what docs/quickstart.md says, line by line: from helm install to a synced second region.
func TestQuickStartInKubernetes(t *testing.T) {
	g := NewWithT(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "quickstart.md"))
	g.Expect(err).NotTo(HaveOccurred())
	_, text2, found := strings.Cut(string(text), "## In Kubernetes")
	g.Expect(found).To(BeTrue())
	var scripts []string
	for _, m := range shellBlock.FindAllStringSubmatch(text2, -1) {
		scripts = append(scripts, m[1])
	}
	g.Expect(scripts).To(HaveLen(5), "install, secrets, declare, wait, write")

	c, err := cluster.Start(ctx, cluster.Options{WithoutCRDs: true, Log: t.Logf})
	if errors.Is(err, kubetest.ErrNoAssets) {
		t.Skip(err)
	}
	g.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() {
		if logs, err := c.Logs(); t.Failed() {
			for file, text := range logs {
				t.Logf("%s: %v\n%s", file, err, cluster.Tail(text, 30))
			}
		}
		g.Expect(c.Close()).To(Succeed())
	})
	eu, err := c.Prepare(ctx, "eu")
	g.Expect(err).NotTo(HaveOccurred())
	us, err := c.Prepare(ctx, "us")
	g.Expect(err).NotTo(HaveOccurred())
	dir := t.TempDir()
	g.Expect(c.Files(dir, eu, us)).To(Succeed())

	for i, script := range scripts {
		out, err := c.Shell(ctx, dir, script)
		g.Expect(err).NotTo(HaveOccurred())
		t.Logf("%s\n%s", script, out)
		switch i {
		case 0: // a cluster would start the pods now
			g.Expect(eu.Sync(ctx)).To(Succeed())
			g.Expect(us.Sync(ctx)).To(Succeed())
		case 3:
			g.Expect(out).To(MatchRegexp(`(?m)^eu +packages\.eu +packages\.example\.com +eu +v1 +True +\S+ +1/1 +4096/4096 `))
			g.Expect(out).To(MatchRegexp(`(?m)^us +packages\.us +packages\.example\.com +us +v1 +True +\S+ +1/1 +4096/4096 `))
		}
	}
	// The last lines of the last script read what was written: in the region that owns it, and as a read copy, which may take a moment.
	g.Eventually(func() (string, error) {
		return c.Shell(ctx, dir, `command curl -sS --cert user.crt --key user.key --cacert ca.crt "$(cat us.endpoint)/v1/sections/admin/packages/apt"`)
	}).WithTimeout(time.Minute).Should(And(ContainSubstring(`"owningRegion":"eu"`), ContainSubstring("2.6.1")))
}
