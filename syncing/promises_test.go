package syncing_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/metrics"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/syncing"
)

var _ = Describe("promises of read copies", func() {
	var (
		w      *world
		eu, us *region
	)
	BeforeEach(func() {
		w = newWorld("eu", "us")
		eu, us = w.regions["eu"], w.regions["us"]
		w.declare("eu", "us")
	})

	DescribeTable("P5: what may be a gap ends Live within 5 s with a reason, and Live is back only after a comparison of everything",
		func(gap func(all []string), reason string, restart bool) {
			all := names("a", 2000)
			eu.save("first", everywhere, all...)
			node, stop := us.sync(nil) // without audits
			live(node, "eu")
			converge(us, eu)
			var seen []syncing.PeerStatus
			watch := func() func() {
				return run(func(ctx context.Context) error {
					for ctx.Err() == nil {
						s := status(node, "eu")
						if n := len(seen); n == 0 || seen[n-1].State != s.State || seen[n-1].LastError != s.LastError {
							seen = append(seen, s)
						}
						time.Sleep(time.Millisecond) // the rhythm of the samples
					}
					return nil
				})
			}
			// What only a comparison of all rows finds: nothing of it is in the feed any more.
			us.sql("DELETE FROM v1.resources WHERE name = 'shelves/a/books/01234'", "UPDATE v1.resources SET resource_version = 0, body = '{}' WHERE name = 'shelves/a/books/00007'")
			if restart {
				stop()
				gap(all)
				node, _ = us.sync(nil)
				Expect(status(node, "eu").State).NotTo(Equal(syncing.Live))
			}
			watched := watch()
			if !restart {
				gap(all)
			}
			began := time.Now()
			if !restart {
				Eventually(func() syncing.State { return status(node, "eu").State }, "5s", "1ms").ShouldNot(Equal(syncing.Live))
				AddReportEntry("left Live after", time.Since(began).String())
			}
			// The first Live status that is seen again comes with equal copies.
			Eventually(func() syncing.State { return status(node, "eu").State }, "30s", "1ms").Should(Equal(syncing.Live))
			Expect(us.rows("name = 'shelves/a/books/01234'")).To(HaveLen(1))
			Expect(us.rows("name = 'shelves/a/books/00007' AND resource_version > 0")).To(HaveLen(1))
			converge(us, eu)
			watched()
			var states, errors []string
			for _, s := range seen {
				states, errors = append(states, string(s.State)), append(errors, s.LastError)
			}
			Expect(states).To(ContainElement("Comparing"))
			if reason != "" {
				Expect(strings.Join(errors, "\n")).To(ContainSubstring(reason))
			}
		},
		Entry("the owner's epoch rises under live streams, which notice it one after the other", func([]string) { eu.sql("SELECT ctl.raise_epoch()") }, "cursor", false),
		Entry("tombstones that the cursor has not seen are purged while the link is cut", func(all []string) {
			eu.link.Cut()
			eu.remove(all[100:300]...)
			Eventually(func() (int, error) { return eu.store.Purge(context.Background(), 0, 1000) }).Should(BeNumerically(">=", 200))
			eu.link.Heal()
			eu.link.Reset()
		}, "cursor", false),
		Entry("the stored cursor is gone", func([]string) { us.sql("DELETE FROM ctl.sync_cursor") }, "", true),
		Entry("the stored cursor is of another history", func([]string) {
			us.sql("UPDATE ctl.sync_cursor SET epoch = epoch + 3")
		}, "cursor", true),
		Entry("the epoch rises while nobody follows", func([]string) { eu.sql("SELECT ctl.raise_epoch()") }, "cursor", true),
	)

	It("F78: two versions of the same regions are copied side by side, each with its own rows and cursors", func() {
		next := w.in("v2")
		next.declare("eu", "us")
		euNext, usNext := next.regions["eu"], next.regions["us"]
		all := names("a", 300)
		writes := func(version string) { eu.sql("UPDATE ctl.deployment_state SET writable_version = '" + version + "'") } // one version takes them
		eu.save("older", everywhere, all...)
		writes("v2")
		euNext.save("newer", everywhere, all[:200]...)
		older, stop := us.sync(nil)
		newer, _ := usNext.sync(nil)
		for range 3 {
			converge(us, eu)
			converge(usNext, euNext)
			live(older, "eu")
			live(newer, "eu")
			writes("v1")
			eu.save("older again", everywhere, all[100:150]...)
			writes("v2")
			euNext.remove(all[:20]...)
		}
		stop()
		writes("v1")
		eu.save("nobody follows the older version", everywhere, all[:10]...)
		writes("v2")
		euNext.save("newer still", everywhere, all[:40]...)
		converge(usNext, euNext)
		Expect(difference(us, eu)()).To(Equal("0 of 300 missing, 10 different, 0 extra"))
		older, _ = us.sync(nil)
		converge(us, eu)
		live(older, "eu")
		Expect(status(older, "eu").RowsApplied).To(BeNumerically("<=", 10), "it goes on from its own cursor")
	})

	It("P2, P3, P6: nothing is lost, reverted or invented during an initial copy over open transactions, deletions and rebirths", func() {
		us.sql(`CREATE TABLE public.backwards (name text, was text, is_now text)`,
			`CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
				IF (NEW.epoch, NEW.resource_version) < (OLD.epoch, OLD.resource_version) THEN
					INSERT INTO public.backwards VALUES (OLD.name, OLD.epoch || '.' || OLD.resource_version, NEW.epoch || '.' || NEW.resource_version);
				END IF;
				RETURN NEW; END $$`,
			`CREATE TRIGGER note AFTER UPDATE ON v1.resources FOR EACH ROW EXECUTE FUNCTION public.note()`)
		all := names("a", 6000)
		eu.save("first", everywhere, all...)
		eu.link.SetBandwidth(3 << 20)
		var rounds atomic.Int64
		writing := run(func(ctx context.Context) error {
			for i := 0; ctx.Err() == nil; i++ {
				at := rand.N(5900)
				eu.save(fmt.Sprint("round ", i), everywhere, all[at:at+50]...)
				eu.remove(all[at+50 : at+60]...)
				eu.save(fmt.Sprint("reborn ", i), everywhere, all[at+52:at+55]...)
				rounds.Add(1)
			}
			return nil
		})
		// Transactions that are open over the owner's snapshots: what they commit becomes visible long after what was written later.
		holding := run(func(ctx context.Context) error {
			c, err := pgx.Connect(context.Background(), eu.dsn)
			if err != nil {
				return err
			}
			defer c.Close(context.Background())
			for ctx.Err() == nil {
				name := all[rand.N(len(all))]
				if _, err := c.Exec(context.Background(), "BEGIN; SELECT pg_current_xact_id()"); err != nil {
					return err
				}
				time.Sleep(200 * time.Millisecond) // it is held open
				_, err := c.Exec(context.Background(), `UPDATE v1.resources SET resource_version = resource_version + 1, change = pg_current_xact_id(),
					body = '{"title":"late"}' WHERE name = '`+name+`' AND state = 0; COMMIT`)
				if err != nil {
					return err
				}
			}
			return nil
		})
		_, stop := us.sync(nil)
		Eventually(func() int { return us.count("true") }, "20s", "5ms").Should(BeNumerically(">", 500))
		stop() // in the middle
		node, _ := us.sync(nil)
		live(node, "eu")
		Eventually(rounds.Load, "20s").Should(BeNumerically(">", 20))
		writing()
		holding()
		eu.link.SetBandwidth(0)
		converge(us, eu)
		Expect(us.have("SELECT count(*) FROM public.backwards")).To(BeZero())
	})

	It("F95, I30, P19: an initial copy and a comparison take no more memory for more rows", func() {
		// 100,000 rows, or a million with DBC_LONG=1.
		rows := 100_000
		if os.Getenv("DBC_LONG") != "" {
			rows = 1_000_000
		}
		eu.sql(fmt.Sprintf(`INSERT INTO v1.resources (name, type, uuid, epoch, resource_version, generation, shard, owning_region, regions, create_time, update_time, body)
			SELECT 'shelves/a/books/' || i, 'Book', md5(i::text)::uuid, 1, 1, 1, i %% %d, 'eu', '{*}', now(), now(), jsonb_build_object('title', i, 'text', repeat(md5(i::text), 32))
			FROM generate_series(1, %d) i`, ring, rows))
		growth := func(what string, limit int64, do func()) {
			GinkgoHelper()
			live := func() int64 {
				s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
				metrics.Read(s)
				return int64(s[0].Value.Uint64())
			}
			runtime.GC()
			before, most := live(), int64(0)
			sampling := run(func(ctx context.Context) error {
				for ctx.Err() == nil {
					most = max(most, live())
					time.Sleep(5 * time.Millisecond) // the rhythm of the samples
				}
				return nil
			})
			do()
			sampling()
			AddReportEntry(what, fmt.Sprintf("%d rows with bodies of %d MiB: the heap grew by %d KiB", rows, rows>>10, (most-before)>>10))
			Expect(most-before).To(BeNumerically("<", limit), what)
		}
		equal := func() {
			GinkgoHelper()
			Eventually(func() (int, error) { return us.have("SELECT count(*) FROM v1.resources WHERE state <> 2") }, "300s", "100ms").Should(Equal(rows))
		}
		var stop func()
		var node *syncing.ControllerNode
		growth("initial copy", 64<<20, func() {
			node, stop = us.sync(nil)
			equal()
			live(node, "eu")
		})
		stop()
		us.sql("DELETE FROM ctl.sync_cursor", "DELETE FROM v1.resources WHERE name LIKE '%77'") // and 1 % is missing
		growth("comparison", 16<<20, func() {
			node, _ = us.sync(nil)
			equal()
			Eventually(func() syncing.State { return status(node, "eu").State }, "300s", "20ms").Should(Equal(syncing.Live))
		})
		Expect(status(node, "eu").RowsApplied).To(BeNumerically("==", rows/100), "only what differs is sent")
	})

	It("P15, X26: one poison row in 10,000 is set aside, counted and listed, and delays nothing else", func() {
		us.sql("ALTER TABLE v1.resources ADD CONSTRAINT poison CHECK (body->>'title' NOT LIKE 'bad%')",
			"ALTER TABLE v1.resources ADD CONSTRAINT short CHECK (length(body->>'title') < 1000)")
		all := names("a", 20_000)
		eu.save("good", everywhere, all...)
		eu.save("bad", everywhere, all[777])
		node, _ := us.sync(nil)
		Eventually(func() int { return us.count("true") }, "40s").Should(Equal(19_999))
		live(node, "eu")
		Expect(status(node, "eu").Quarantined).To(BeNumerically("==", 1))

		// The same in live changes, with rows of other kinds among them, while a heartbeat is watched.
		var worst atomic.Int64
		beating := run(func(ctx context.Context) error {
			for i := 0; ctx.Err() == nil; i++ {
				title := fmt.Sprint("beat ", i)
				eu.save(title, everywhere, "shelves/h/books/heart")
				wrote := time.Now()
				Eventually(func() (map[string]string, error) {
					return us.rows("name = 'shelves/h/books/heart' AND body->>'title' = $1", title+" shelves/h/books/heart")
				}, "20s", "2ms").Should(HaveLen(1))
				worst.Store(max(worst.Load(), int64(time.Since(wrote))))
			}
			return nil
		})
		for i := range 4 {
			eu.save(fmt.Sprint("again ", i), everywhere, all[5000*i+1000:5000*i+5000]...)
			eu.save([]string{"bad", strings.Repeat("long ", 300)}[i%2], everywhere, all[5000*i+2500])
		}
		Eventually(func() int64 { return status(node, "eu").Quarantined }, "60s", "50ms").Should(BeNumerically("==", 5))
		beating()
		Eventually(difference(us, eu), "60s", "50ms").Should(Equal("1 of 20001 missing, 4 different, 0 extra"))
		Expect(time.Duration(worst.Load())).To(BeNumerically("<", 2*time.Second), "what is not poison is not delayed")
		listed, total, err := us.store.Quarantine(context.Background(), "eu", 100)
		Expect(err).NotTo(HaveOccurred())
		Expect(total).To(Equal(5))
		var held []string
		for _, q := range listed {
			held = append(held, q.Name)
			Expect(q.Cause).NotTo(BeEmpty())
			Expect(q.Version).NotTo(Equal(store.Version{}))
		}
		Expect(held).To(ConsistOf(all[777], all[2500], all[7500], all[12500], all[17500]))
		live(node, "eu")

		us.sql("ALTER TABLE v1.resources DROP CONSTRAINT poison", "ALTER TABLE v1.resources DROP CONSTRAINT short")
		eu.save("cured", everywhere, held...)
		converge(us, eu)
		Eventually(func() int64 { return status(node, "eu").Quarantined }, "20s").Should(BeZero())
	})
})

// have asks the region's database for a number.
func (r *region) have(sql string) (n int, err error) {
	c, err := pgx.Connect(context.Background(), r.dsn)
	if err != nil {
		return 0, err
	}
	defer c.Close(context.Background())
	err = c.QueryRow(context.Background(), sql).Scan(&n)
	return n, err
}
