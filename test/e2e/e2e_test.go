// Package e2e runs the product as its users do and breaks what can break: see package cluster for what is real here.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/internal/kubetest"
	"github.com/dbcontroller/db-controller/test/e2e/cluster"
)

// Leases are shorter than usual, so that the test is.
const (
	lease         = 10 * time.Second
	renewDeadline = 7 * time.Second
	retryPeriod   = 2 * time.Second
	// soon is a deadline for what should take a moment, on a machine that may have other work.
	soon = 2 * time.Minute
)

// failure is a test that remembers why it has failed, to tell it again behind long logs.
type failure struct {
	*testing.T
	message string
}

// Fatalf implements gomega's types.GomegaTestingT.
func (f *failure) Fatalf(format string, args ...any) {
	f.Helper()
	f.message = fmt.Sprintf(format, args...)
	f.T.Fatalf(format, args...)
}

// TestRegionsOnARealControlPlane installs the chart for three regions, adds a fourth one live, scales managers 1 -> 3 -> 7 -> 2, and kills and pauses them and the
// kube-apiserver, while writers write through the API servers of two regions. Shows D6, O1-O7, P1, P12, P13, P22, F57-F60, F76-F79, I31, I39, X22-X24, X34, X36.
func TestRegionsOnARealControlPlane(t *testing.T) {
	reason := &failure{T: t}
	g := NewWithT(reason)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	seed := rand.Uint64()
	if s := os.Getenv("DBC_SEED"); s != "" {
		var err error
		seed, err = strconv.ParseUint(s, 10, 64)
		g.Expect(err).NotTo(HaveOccurred())
	}
	random := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed: DBC_SEED=%d", seed)

	c, err := cluster.Start(ctx, cluster.Options{Lease: lease, RenewDeadline: renewDeadline, RetryPeriod: retryPeriod, Managers: 2, Log: t.Logf})
	if errors.Is(err, kubetest.ErrNoAssets) {
		t.Skip(err)
	}
	g.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() {
		logs, err := c.Logs()
		for file, text := range logs {
			if t.Failed() {
				t.Logf("%s: %v\n%s", file, err, cluster.Tail(text, 40))
			}
			if strings.Contains(text, "panic:") {
				t.Errorf("%s: a process has panicked:\n%s", file, cluster.Tail(text, 60))
			}
		}
		if t.Failed() {
			t.Log(reason.message)
		}
		g.Expect(c.Close()).To(Succeed())
	})

	ready := func(regions ...string) {
		t.Helper()
		for _, name := range regions {
			_, err := cluster.Until(ctx, soon, name+" is ready", func() (bool, string) { return c.Region(name).Ready(ctx) })
			g.Expect(err).NotTo(HaveOccurred())
		}
	}
	equal := func() {
		t.Helper()
		_, err := cluster.Until(ctx, soon, "all copies are equal", func() (bool, string) {
			d, err := c.Differences(ctx)
			return err == nil && len(d) == 0, fmt.Sprint(d, err)
		})
		g.Expect(err).NotTo(HaveOccurred())
	}

	// Three regions: helm install, declare, written in one, seen in the others.
	for _, name := range []string{"eu", "us", "ap"} {
		_, err := c.Install(ctx, name)
		g.Expect(err).NotTo(HaveOccurred())
	}
	g.Expect(c.Declare(ctx, "eu", "us", "ap")).To(Succeed())
	ready("eu", "us", "ap")
	for _, name := range c.Regions() {
		g.Expect(c.Region(name).Audit(ctx)).To(Succeed())
	}
	g.Expect(c.SetPolicy(ctx, "eu", "eu", "us", "ap")).To(Succeed())
	const rows = 3000
	g.Expect(c.Fill(ctx, "eu", 0, rows)).To(Succeed())
	equal()

	us := c.Region("us")
	load := c.Load(ctx, 25, rows, "us", "eu", "us")
	figures := func(when string) {
		f := load.Reset()
		t.Logf("%-34s %4d writes, %d failed; %3d watched: p50 %s p99 %s max %s", when, f.Writes, f.Failed, f.Watched,
			f.P50.Round(time.Millisecond), f.P99.Round(time.Millisecond), f.Max.Round(time.Millisecond))
	}
	paused := map[string]bool{}
	alive := func(holder string) bool {
		for _, p := range us.Managers() {
			if strings.HasPrefix(holder, p.Pod+"_") && !paused[p.Pod] { // the rest names the membership and the node
				return true
			}
		}
		return false
	}
	// covered waits until live nodes of us, of n managers, own every shard for every kind of nodes, evenly, and returns how long that took and the owners.
	covered := func(n int, what string) (time.Duration, []string) {
		t.Helper()
		var owners []string
		took, err := cluster.Until(ctx, soon, what, func() (bool, string) {
			for _, kind := range []string{"constraint", "policy", "syncing"} {
				if owners, err = us.Owners(ctx, kind); err != nil {
					return false, err.Error()
				}
				sizes := cluster.Sizes(owners)
				if !cluster.Covered(owners, alive) || len(sizes) != n {
					return false, fmt.Sprint(kind, sizes)
				}
				for _, size := range sizes {
					if float64(size) < 0.79*4096/float64(n) || float64(size) > 1.21*4096/float64(n) {
						return false, fmt.Sprint(kind, sizes)
					}
				}
			}
			return true, ""
		})
		g.Expect(err).NotTo(HaveOccurred())
		t.Logf("%-34s %s, owners %v", what, took.Round(time.Millisecond), cluster.Sizes(owners))
		return took, owners
	}
	_, owners := covered(2, "two managers")
	figures("before anything happens")

	// A fourth region joins while the others work.
	_, err = c.Install(ctx, "sa")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(c.Declare(ctx, "sa")).To(Succeed())
	ready("sa")
	g.Expect(c.Region("sa").Audit(ctx)).To(Succeed())
	g.Expect(c.SetPolicy(ctx, "us", "eu", "us", "ap", "sa")).To(Succeed())
	_, err = cluster.Until(ctx, soon, "sa has copies", func() (bool, string) {
		var n int
		err := c.Region("sa").DB.QueryRow(ctx, "SELECT count(*) FROM v1.resources WHERE owning_region = 'eu' AND state <> 2").Scan(&n)
		missing, merr := c.Missing(ctx, "eu", "sa")
		return n >= rows, fmt.Sprintf("%d rows; %d missing or old: %s; %v", n, len(missing), strings.Join(missing, ", "), errors.Join(err, merr))
	})
	g.Expect(err).NotTo(HaveOccurred())
	figures("a fourth region joined")

	// Scaling.
	scale := func(from, to int) {
		t.Helper()
		before := owners
		g.Expect(us.Scale(ctx, int32(to))).To(Succeed())
		_, owners = covered(to, fmt.Sprintf("scaled %d to %d", from, to))
		least := 1 - float64(min(from, to))/float64(max(from, to))
		t.Logf("%-34s moved %.2f of the ring, at least %.2f must", fmt.Sprintf("scaled %d to %d", from, to), cluster.Moved(before, owners), least)
		figures(fmt.Sprintf("scaled %d to %d", from, to))
	}
	scale(2, 1)
	scale(1, 3)
	scale(3, 7)
	scale(7, 2)
	scale(2, 3)

	// The leader and an owner die at once (P13), are not missed for longer than one and a half leases, and come back.
	faults := map[string]int{}
	managers := us.Managers()
	for _, victim := range managers[:2] {
		g.Expect(victim.Kill()).To(Succeed())
		faults["SIGKILL"]++
	}
	took, _ := covered(1, "two of three killed")
	t.Logf("covered again after %.2f lease times", float64(took)/float64(lease))
	g.Expect(us.Sync(ctx)).To(Succeed())
	covered(3, "killed ones are back")
	figures("killed")

	// Paused for longer than its lease, while it has work in hand; when it wakes up, it may not write (O1, P12).
	for range 2 {
		victim := cluster.Pick(random, us.Managers())
		g.Expect(victim.Pause()).To(Succeed())
		faults["SIGSTOP"]++
		paused[victim.Pod] = true
		took, _ := covered(2, victim.Pod+" paused")
		t.Logf("covered again after %.2f lease times", float64(took)/float64(lease))
		delete(paused, victim.Pod)
		g.Expect(victim.Resume()).To(Succeed())
		faults["SIGCONT"]++
		covered(3, victim.Pod+" woken up")
	}
	figures("paused and woken up")

	// The control plane goes away for longer than a lease: what has lost its lease stops, and goes on when it can.
	// The leaders of the controllers end their processes, which are started again, as a kubelet does.
	g.Expect(c.RestartControlPlane(ctx, 2*lease)).To(Succeed())
	faults["kube-apiserver restarted"]++
	kubelet, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for kubelet.Err() == nil {
			for _, name := range c.Regions() {
				if err := c.Region(name).Sync(kubelet); err != nil && kubelet.Err() == nil {
					t.Log(err)
				}
			}
			time.Sleep(time.Second)
		}
	}()
	defer func() { stop(); <-ended }()
	covered(3, "control plane back")
	figures("control plane restarted")
	ready(c.Regions()...)

	g.Expect(load.Stop()).To(Succeed())
	equal()
	for _, name := range c.Regions() {
		a, err := c.Region(name).Audited(ctx)
		g.Expect(err).NotTo(HaveOccurred())
		t.Logf("%s: %d rows written by nodes under %d claims; regressed %d, outside %d, unknown %d", name, a.Writes, a.Claims, a.Regressed, a.Outside, a.Unknown)
		g.Expect(a.Regressed).To(BeZero(), "%s: writes under an older claim than an earlier one", name)
		g.Expect(a.Outside).To(BeZero(), "%s: writes of shards that are not the claim's", name)
		g.Expect(a.Unknown).To(BeZero(), "%s: writes under claims that were never made", name)
	}
	g.Expect(faults).To(Equal(map[string]int{"SIGKILL": 2, "SIGSTOP": 2, "SIGCONT": 2, "kube-apiserver restarted": 1}))
	t.Logf("faults that fired: %v; seed %d", maps.Collect(maps.All(faults)), seed)
}
