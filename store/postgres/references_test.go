package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/types"

	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
)

var _ = Describe("references", func() {
	var s *postgres.Store
	var dsn string
	BeforeEach(func() {
		dsn = pgtest.Database(GinkgoTB())
		s = openDSN(dsn, "eu")
	})
	elsewhere := store.Location{Service: "library.example.com", Region: "us"}
	all := feed.Range{From: 0, To: 4096}

	ref := func(field, target string, b store.Behavior) store.Reference {
		return store.Reference{Field: field, Target: target, Behavior: b}
	}
	foreign := func(target string, b store.Behavior, g store.Grant) store.Reference {
		return store.Reference{Field: "far", Target: target, Behavior: b, At: elsewhere, Grant: &g}
	}
	saved := func(name string, refs ...store.Reference) store.Write {
		w := save(name, fmt.Sprintf(`{"serial":%d}`, time.Now().UnixNano()))
		w.Constraint = &store.Constraint{References: refs}
		return w
	}
	deleted := func(name string) store.Write {
		return store.Write{Op: store.Delete, Name: name, Constraint: &store.Constraint{}}
	}
	write := func(writes ...store.Write) error {
		_, err := s.BatchWrite(GinkgoTB().Context(), writes)
		return err
	}
	ok := func(err error) {
		GinkgoHelper()
		Expect(err).NotTo(HaveOccurred())
	}
	changed := func() types.GomegaMatcher { return MatchError(store.ErrChanged) } // a matcher has state
	shadow := func(name string) *store.Shadow {
		GinkgoHelper()
		h, err := s.Shadow(GinkgoTB().Context(), name)
		ok(err)
		return h
	}
	establish := func(tx string, attempt int, targets ...string) []store.Grant {
		GinkgoHelper()
		e := store.Establish{Requester: elsewhere, Referrer: "shelves/s9/books/far", TxID: tx, Attempt: attempt, TTL: time.Minute}
		for _, t := range targets {
			e.Targets = append(e.Targets, store.EstablishTarget{Name: t, Blocking: true})
		}
		grants, err := s.Establish(GinkgoTB().Context(), e)
		ok(err)
		return grants
	}
	count := func(sql string, args ...any) (n int) {
		GinkgoHelper()
		conn, err := pgx.Connect(GinkgoTB().Context(), dsn)
		ok(err)
		defer conn.Close(context.Background())
		ok(conn.QueryRow(GinkgoTB().Context(), sql, args...).Scan(&n))
		return n
	}

	Describe("of a save", func() {
		It("need a target that lives, in the same transaction in either order (I2, I10, F41)", func() {
			err := write(saved("shelves/a", ref("b", "shelves/b", store.Block)))
			Expect(err).To(haveCode(store.FailedPrecondition))
			Expect(err).To(MatchError(And(ContainSubstring("shelves/a"), ContainSubstring("b: shelves/b does not exist"))))
			_, err = s.Get(GinkgoTB().Context(), "shelves/a")
			Expect(err).To(haveCode(store.NotFound), "nothing of it is visible")

			ok(write(saved("shelves/a", ref("b", "shelves/b", store.Block)), saved("shelves/b", ref("a", "shelves/a", store.Block))))
			Expect(shadow("shelves/a").References).To(HaveLen(1))
			Expect(write(saved("shelves/c", ref("d", "shelves/d", store.Block)), saved("shelves/e"))).To(haveCode(store.FailedPrecondition))
			Expect(write(saved("shelves/self", ref("me", "shelves/self", store.Block)))).To(Succeed())
			Expect(write(saved("shelves/d", ref("x", "shelves/none", store.AllowDangling)))).To(Succeed())
		})

		It("follow the body: added, kept, changed and dropped (I8, F38)", func() {
			ok(write(saved("shelves/x"), saved("shelves/y"), saved("shelves/z")))
			refs := func() []store.Reference { return shadow("shelves/a").References }
			ok(write(saved("shelves/a", ref("f", "shelves/x", store.Block), ref("f", "shelves/y", store.Unset))))
			Expect(refs()).To(ConsistOf(ref("f", "shelves/x", store.Block), ref("f", "shelves/y", store.Unset)))
			ok(write(saved("shelves/a", ref("f", "shelves/y", store.Cascade), ref("g", "shelves/z", store.Block))))
			Expect(refs()).To(ConsistOf(ref("f", "shelves/y", store.Cascade), ref("g", "shelves/z", store.Block)))
			ok(write(saved("shelves/a")))
			Expect(refs()).To(BeEmpty())
			ok(write(deleted("shelves/x")))
		})

		It("hold against a deletion at the same time, in thousands of races", func(ctx SpecContext) {
			var wg sync.WaitGroup
			for n := range 4 {
				wg.Go(func() {
					defer GinkgoRecover()
					for i := range 100 {
						target := fmt.Sprintf("shelves/t%d-%d", n, i)
						ok(write(saved(target)))
						var race sync.WaitGroup
						var saveErr, deleteErr error
						w := saved(target+"r", ref("t", target, store.Block))
						if i%2 == 0 {
							w.Op = store.Create // has a statement of its own
						}
						race.Go(func() { saveErr = write(w) })
						race.Go(func() { deleteErr = write(deleted(target)) })
						race.Wait()
						if saveErr == nil {
							Expect(deleteErr).To(changed(), target)
						} else {
							Expect(saveErr).To(haveCode(store.FailedPrecondition), target)
							ok(deleteErr)
						}
					}
				})
			}
			wg.Wait()
			Expect(count("SELECT count(*) FROM v1.refs r WHERE NOT EXISTS (SELECT FROM v1.resources t WHERE t.name = r.target AND t.state = 0)")).To(BeZero())
		})
	})

	Describe("of a deletion", func() {
		It("must be part of the plan (F46, F48, F49)", func(ctx SpecContext) {
			ok(write(saved("shelves/t")))
			ok(write(saved("shelves/b", ref("f", "shelves/t", store.Block)), saved("shelves/u", ref("f", "shelves/t", store.Unset)), saved("shelves/c", ref("f", "shelves/t", store.Cascade)), saved("shelves/a", ref("f", "shelves/t", store.AsyncCascade))))
			ok(write(saved("shelves/cc", ref("f", "shelves/c", store.Cascade))))
			c, err := s.Closure(ctx, []string{"shelves/t"}, 1000, 16, 10)
			ok(err)
			var doomed []string
			for _, d := range c.Delete {
				doomed = append(doomed, d.Name)
			}
			Expect(doomed).To(Equal([]string{"shelves/t", "shelves/c", "shelves/cc"}))
			Expect(c.Unset).To(HaveLen(1))
			Expect(c.Async).To(HaveLen(1))
			Expect(c.Blockers).To(ConsistOf(store.Blocker{Target: "shelves/t", Referrer: "shelves/b", Field: "f"}))
			ok(write(deleted("shelves/b")))
			Expect(write(deleted("shelves/t"))).To(changed())
			Expect(write(deleted("shelves/t"), deleted("shelves/c"), deleted("shelves/cc"))).To(changed(), "the unset is missing")
			cascaded := func(name string) store.Write {
				w := deleted(name)
				w.Constraint.Closure = true
				return w
			}
			Expect(write(deleted("shelves/none"), cascaded("shelves/c"), cascaded("shelves/cc"))).To(haveCode(store.NotFound))
			_, err = s.Get(ctx, "shelves/c")
			ok(err)
			stale := cascaded("shelves/cc")
			stale.IfVersion = c.Delete[2].Version
			ok(write(saved("shelves/cc", ref("f", "shelves/c", store.Cascade))))
			Expect(write(deleted("shelves/t"), cascaded("shelves/c"), stale, saved("shelves/u"))).To(changed(), "it is not as it was planned")
			ok(write(deleted("shelves/t"), cascaded("shelves/c"), cascaded("shelves/cc"), saved("shelves/u")))
			_, err = s.Get(ctx, "shelves/c")
			Expect(err).To(haveCode(store.NotFound))
			Expect(shadow("shelves/t").State).To(Equal(store.ShadowDeleting), "an asynchronous referrer is left (F52)")
			_, err = s.Get(ctx, "shelves/t")
			Expect(err).To(haveCode(store.NotFound))
			Expect(write(saved("shelves/t"))).To(haveCode(store.FailedPrecondition), "the name is in use (8.7)")

			done, err := s.FinishDeletion(ctx, "shelves/t", shadow("shelves/t").UUID, 1, nil)
			ok(err)
			Expect(done).To(BeFalse())
			handled, err := s.HandledReferrers(ctx, store.Location{}, "shelves/t", shadow("shelves/t").UUID, 10)
			ok(err)
			Expect(handled).To(HaveLen(1))
			ok(write(deleted("shelves/a")))
			done, err = s.FinishDeletion(ctx, "shelves/t", shadow("shelves/t").UUID, 1, nil)
			ok(err)
			Expect(done).To(BeTrue())
			ok(write(saved("shelves/t")))
		})

		It("waits for children that stay readable, and for the service (F53, F54, F55)", func(ctx SpecContext) {
			ok(write(saved("shelves/p")))
			ok(write(saved("shelves/p/books/c", store.Reference{Field: "name", Kind: store.ParentReference, Behavior: store.Cascade, Target: "shelves/p"})))
			async := func(name string) store.Write {
				w := deleted(name)
				w.Constraint.AsyncDeletion = true
				return w
			}
			ok(write(deleted("shelves/p"), async("shelves/p/books/c")))
			r, err := s.Get(ctx, "shelves/p/books/c")
			ok(err)
			Expect(r.State).To(Equal(store.Deleting))
			Expect(r.Body).NotTo(BeEmpty())
			parent, child := shadow("shelves/p"), shadow("shelves/p/books/c")
			done, err := s.FinishDeletion(ctx, parent.Name, parent.UUID, 1, nil)
			ok(err)
			Expect(done).To(BeFalse())
			ok(write(async("shelves/p/books/c")))
			done, err = s.FinishDeletion(ctx, child.Name, child.UUID, 1, nil)
			ok(err)
			Expect(done).To(BeTrue())
			_, err = s.Get(ctx, child.Name)
			Expect(err).To(haveCode(store.NotFound))
			done, err = s.FinishDeletion(ctx, parent.Name, parent.UUID, 1, nil)
			ok(err)
			Expect(done).To(BeTrue())

			yes, no := true, false
			w := saved("shelves/q")
			w.BlockDeletion = &yes
			ok(write(w))
			Expect(write(deleted("shelves/q"))).To(haveCode(store.FailedPrecondition))
			ok(write(saved("shelves/q")))
			Expect(write(deleted("shelves/q"))).To(haveCode(store.FailedPrecondition), "a save does not lift it")
			w.BlockDeletion = &no
			ok(write(w))
			ok(write(deleted("shelves/q")))
		})
	})

	Describe("from another Deployment", func() {
		It("are established, confirmed and asked for (F9, F12, F14, I3, I4, I5)", func(ctx SpecContext) {
			ok(write(saved("shelves/t")))
			tx := uuid.NewString()
			g := establish(tx, 1, "shelves/t")
			Expect(g[0].RowVersion % 2).To(BeZero())
			h := shadow("shelves/t")
			Expect(h.Blockades).To(HaveLen(1))
			Expect(h.Sources).To(ConsistOf(store.Source{Location: elsewhere, Blocking: true}))
			Expect(write(deleted("shelves/t"))).To(changed(), "a tentative blockade")
			establish(tx, 2, "shelves/t")
			establish(tx, 1, "shelves/t") // late: F11, X5
			Expect(shadow("shelves/t").Blockades).To(HaveLen(1))
			Expect(shadow("shelves/t").Blockades[0].Attempt).To(Equal(2))
			other := uuid.NewString()
			establish(other, 1, "shelves/t")
			missing, err := s.Confirm(ctx, elsewhere, []store.Confirmed{{Referrer: "shelves/s9/books/far", Name: "shelves/t", Blocking: true, TxID: tx}, {Referrer: "x", Name: "shelves/none", TxID: tx}})
			ok(err)
			Expect(missing).To(Equal([]string{"shelves/none"}))
			Expect(shadow("shelves/t").Blockades).To(HaveLen(1), "that of the other transaction (X41)")
			_, err = s.Confirm(ctx, elsewhere, []store.Confirmed{{Referrer: "shelves/s9/books/far", Name: "shelves/t", Blocking: true, TxID: other}})
			ok(err)
			Expect(shadow("shelves/t").Blockades).To(BeEmpty())

			Expect(write(deleted("shelves/t"))).To(changed(), "the source has not been asked")
			q, err := s.BeginAttempt(ctx, []string{"shelves/t"})
			ok(err)
			Expect(q["shelves/t"].RowVersion % 2).To(BeEquivalentTo(1))
			asked := deleted("shelves/t")
			asked.Constraint.Asked, asked.Constraint.Attempt = []store.Location{elsewhere}, q["shelves/t"].RowVersion
			establish(uuid.NewString(), 1, "shelves/t")
			Expect(write(asked)).To(changed(), "a grant has overtaken the attempt (X6)")
			Expect(shadow("shelves/t").RowVersion % 2).To(BeZero())
		})

		It("refuses what is missing, deleted or unmanaged, all or nothing", func(ctx SpecContext) {
			ok(write(saved("shelves/t"), save("shelves/free", `{}`)))
			e := store.Establish{Requester: elsewhere, Referrer: "r", TxID: uuid.NewString(), Attempt: 1, TTL: time.Minute,
				Targets: []store.EstablishTarget{{Name: "shelves/t"}, {Name: "shelves/free"}, {Name: "shelves/none"}}}
			_, err := s.Establish(ctx, e)
			Expect(err).To(haveCode(store.NotFound))
			Expect(err).To(MatchError(And(ContainSubstring("shelves/none"), ContainSubstring("shelves/free"))))
			Expect(shadow("shelves/t").Blockades).To(BeEmpty())
		})

		It("delete only after everybody was asked, and tell those who must react (F54)", func(ctx SpecContext) {
			ok(write(saved("shelves/t")))
			tx := uuid.NewString()
			_, err := s.Establish(ctx, store.Establish{Requester: elsewhere, Referrer: "r", TxID: tx, Attempt: 1, TTL: time.Millisecond,
				Targets: []store.EstablishTarget{{Name: "shelves/t", Blocking: true, Subscriber: true}}})
			ok(err)
			Eventually(func() []store.Blockade {
				b, err := s.ExpiredBlockades(ctx, all, 10)
				ok(err)
				return b
			}).Should(HaveLen(1))
			q, err := s.BeginAttempt(ctx, []string{"shelves/t"})
			ok(err)
			w := deleted("shelves/t")
			w.Constraint.Asked, w.Constraint.Attempt = []store.Location{elsewhere}, q["shelves/t"].RowVersion
			ok(write(w))
			h := shadow("shelves/t")
			Expect(h.State).To(Equal(store.ShadowDeleting))
			var tasks []store.Task
			_, err = s.ReadTasks(ctx, feed.Cursor{}, all, func(t store.Task) error { tasks = append(tasks, t); return nil })
			ok(err)
			Expect(tasks).To(HaveLen(1))
			Expect(tasks[0].State).To(Equal(store.ShadowDeleting))
			n, err := s.Purge(ctx, 0, 10)
			ok(err)
			Expect(n).To(BeZero(), "a tombstone that somebody must see is not purged")
			done, err := s.FinishDeletion(ctx, h.Name, h.UUID, 1, nil)
			ok(err)
			Expect(done).To(BeFalse())
			done, err = s.FinishDeletion(ctx, h.Name, h.UUID, 1, []store.Location{elsewhere})
			ok(err)
			Expect(done).To(BeTrue())
		})

		It("delete nothing that was planned before a failover, or for another incarnation", func(ctx SpecContext) {
			ok(write(saved("shelves/t")))
			c, err := s.Closure(ctx, []string{"shelves/t"}, 10, 10, 0)
			ok(err)
			w := deleted("shelves/t")
			w.Constraint.Epoch, w.Constraint.UUID = c.Epoch, uuid.NewString()
			Expect(write(w)).To(changed())
			w.Constraint.UUID = c.Delete[0].UUID
			_, err = s.RaiseEpoch(ctx)
			ok(err)
			Expect(write(w)).To(changed())
			q, err := s.BeginAttempt(ctx, []string{"shelves/t"})
			ok(err)
			stale := q["shelves/t"]
			stale.Epoch = c.Epoch
			pruned, err := s.PruneSource(ctx, stale, elsewhere, store.Source{})
			ok(err)
			Expect(pruned).To(BeFalse())
			pruned, err = s.PruneSource(ctx, q["shelves/t"], elsewhere, store.Source{})
			ok(err)
			Expect(pruned).To(BeTrue())
			w.Constraint.Epoch = q["shelves/t"].Epoch
			ok(write(w))
		})

		It("suspects those who may have been forgotten in a failover", func(ctx SpecContext) {
			got, err := s.Suspects(ctx, []store.Location{elsewhere})
			ok(err)
			Expect(got).To(BeEmpty())
			epoch, err := s.RaiseEpoch(ctx)
			ok(err)
			got, err = s.Suspects(ctx, []store.Location{elsewhere})
			ok(err)
			Expect(got).To(ConsistOf(elsewhere))
			ok(s.ConfirmEpoch(ctx, elsewhere, epoch-1))
			got, err = s.Suspects(ctx, []store.Location{elsewhere})
			ok(err)
			Expect(got).To(ConsistOf(elsewhere))
			ok(s.ConfirmEpoch(ctx, elsewhere, epoch))
			got, err = s.Suspects(ctx, []store.Location{elsewhere})
			ok(err)
			Expect(got).To(BeEmpty())
		})
	})

	Describe("to another Deployment", func() {
		grant := func(rowVersion int64) store.Grant {
			_, mark, err := s.Outgoing(GinkgoTB().Context(), nil)
			ok(err)
			return store.Grant{TxID: uuid.NewString(), UUID: "0190d0a0-0000-7000-8000-000000000001", Epoch: 1, RowVersion: rowVersion, Home: mark}
		}
		question := func(rowVersion int64) store.Question {
			return store.Question{Name: "shelves/far", UUID: "0190d0a0-0000-7000-8000-000000000001", Epoch: 1, RowVersion: rowVersion}
		}
		It("are pending until they are confirmed (F42, F61)", func(ctx SpecContext) {
			g := grant(0)
			ok(write(saved("shelves/r", foreign("shelves/far", store.Block, g))))
			h := shadow("shelves/r")
			Expect(h.Tasks).To(Equal(store.ConfirmBlockades))
			unconfirmed, err := s.Unconfirmed(ctx, "shelves/r")
			ok(err)
			Expect(unconfirmed).To(HaveLen(1))
			Expect(unconfirmed[0].Grant.TxID).To(Equal(g.TxID))
			stale := unconfirmed[0]
			stale.Grant = &store.Grant{TxID: uuid.NewString()}
			ok(s.MarkConfirmed(ctx, "shelves/r", []store.Reference{stale}))
			Expect(shadow("shelves/r").Tasks).To(Equal(store.ConfirmBlockades))
			ok(s.MarkConfirmed(ctx, "shelves/r", unconfirmed))
			Expect(shadow("shelves/r").Tasks).To(BeZero())
			ok(write(saved("shelves/r", store.Reference{Field: "far", Target: "shelves/far", Behavior: store.Block, At: elsewhere})))
			Expect(shadow("shelves/r").Tasks).To(BeZero(), "an unchanged reference needs no grant")
			out, _, err := s.Outgoing(ctx, []string{"shelves/r"})
			ok(err)
			Expect(out["shelves/r"]).To(HaveLen(1))
		})
		It("are void behind a fence, a failover and a purge (D1, R1, R4)", func(ctx SpecContext) {
			old := grant(0)
			answers, err := s.CheckBlocked(ctx, elsewhere, []store.Question{question(1)}, nil)
			ok(err)
			Expect(answers).To(Equal([]store.BlockedAnswer{{Sample: []string{}}}))
			Expect(write(saved("shelves/r", foreign("shelves/far", store.Block, old)))).To(changed())
			ok(write(saved("shelves/r", foreign("shelves/far", store.Block, grant(2)))))
			answers, err = s.CheckBlocked(ctx, elsewhere, []store.Question{question(3)}, nil)
			ok(err)
			Expect(answers[0].Blocked).To(BeTrue())
			Expect(answers[0].Sample).To(Equal([]string{"shelves/r"}))
			n, _, err := s.CheckSubscriber(ctx, elsewhere, question(math.MaxInt64))
			ok(err)
			Expect(n).To(BeZero())
			Expect(write(saved("shelves/r2", foreign("shelves/far", store.AsyncUnset, grant(4))))).To(changed())

			late := grant(0)
			late.UUID = "0190d0a0-0000-7000-8000-000000000002"
			removed, err := s.PurgeFences(ctx, 0, 10)
			ok(err)
			Expect(removed).To(Equal(1))
			Expect(write(saved("shelves/r3", foreign("shelves/far", store.AsyncUnset, late)))).To(changed(), "fences of it may have been purged")
			late.Home = grant(0).Home
			ok(write(saved("shelves/r3", foreign("shelves/far", store.AsyncUnset, late))))
			late.Home = grant(0).Home
			_, err = s.RaiseEpoch(ctx)
			ok(err)
			Expect(write(saved("shelves/r4", foreign("shelves/far", store.AsyncUnset, late)))).To(changed(), "fences of it may have been lost")
		})
		It("are void once a sweep for a later epoch of the target has begun (I4)", func(ctx SpecContext) {
			old := grant(0)
			ok(s.BeginSweep(ctx, elsewhere, 2))
			ok(s.BeginSweep(ctx, elsewhere, 1))
			Expect(write(saved("shelves/r", foreign("shelves/far", store.Block, old)))).To(changed())
			old.Epoch = 2
			ok(write(saved("shelves/r", foreign("shelves/far", store.Block, old))))
		})
		It("are listed for a sweep, and handled when their target goes (F65, F66)", func(ctx SpecContext) {
			for i := range 5 {
				ok(write(saved(fmt.Sprintf("shelves/r%d", i), foreign("shelves/far", store.Cascade, grant(0)))))
			}
			refs, next, err := s.ReferencesTo(ctx, elsewhere, "", 2)
			ok(err)
			Expect(refs).To(Equal([]store.Confirmed{{Referrer: "shelves/r0", Name: "shelves/far", Subscriber: true, Field: "far"}, {Referrer: "shelves/r1", Name: "shelves/far", Subscriber: true, Field: "far"}}))
			Expect(next).To(Equal("shelves/r1"))
			refs, next, err = s.ReferencesTo(ctx, elsewhere, "shelves/r1", 10)
			ok(err)
			Expect(refs).To(HaveLen(3))
			Expect(next).To(BeEmpty())
			ok(s.RaiseTasks(ctx, []string{"shelves/r2"}, store.PendingDelete))
			handled, err := s.HandledReferrers(ctx, elsewhere, "shelves/far", grant(0).UUID, 10)
			ok(err)
			Expect(handled).To(HaveLen(4))
			handled, err = s.HandledReferrers(ctx, elsewhere, "shelves/far", uuid.NewString(), 10)
			ok(err)
			Expect(handled).To(BeEmpty(), "they refer to another incarnation")
		})
		It("are waited for before anybody answers that there are none (D1)", func(ctx SpecContext) {
			// A save in the middle of its transaction, by hand: the lock, the look at the fences, the reference, and only then the commit.
			conn, err := pgx.Connect(ctx, dsn)
			ok(err)
			defer conn.Close(context.Background())
			tx, err := conn.Begin(ctx)
			ok(err)
			_, err = tx.Exec(ctx, "SELECT ctl.lock_target(false, $1, 'shelves/far')", elsewhere.String())
			ok(err)
			_, err = tx.Exec(ctx, "INSERT INTO v1.refs VALUES ('shelves/r', 'far', 'shelves/far', $1, 0, 1)", elsewhere.String())
			ok(err)
			answered := make(chan []store.BlockedAnswer, 1)
			go func() {
				defer GinkgoRecover()
				answers, err := s.CheckBlocked(ctx, elsewhere, []store.Question{question(1)}, nil)
				ok(err)
				answered <- answers
			}()
			Eventually(func() int {
				return count("SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory' AND classid = 3517")
			}).Should(Equal(1))
			Expect(answered).NotTo(Receive())
			ok(tx.Commit(ctx))
			var answers []store.BlockedAnswer
			Eventually(answered).Should(Receive(&answers))
			Expect(answers[0].Blocked).To(BeTrue())
		})
		It("answers and saves at the same time agree", func(ctx SpecContext) {
			for i := range 200 {
				id := uuid.NewString()
				target := fmt.Sprintf("shelves/far%d", i)
				g := grant(0)
				g.UUID = id
				var race sync.WaitGroup
				var err error
				var answers []store.BlockedAnswer
				race.Go(func() {
					defer GinkgoRecover()
					err = write(saved(fmt.Sprintf("shelves/near%d", i), foreign(target, store.Block, g)))
				})
				race.Go(func() {
					defer GinkgoRecover()
					var aerr error
					answers, aerr = s.CheckBlocked(ctx, elsewhere, []store.Question{{Name: target, UUID: id, Epoch: 1, RowVersion: 1}}, nil)
					Expect(aerr).NotTo(HaveOccurred())
				})
				race.Wait()
				Expect(answers[0].Blocked).To(Equal(err == nil), "either the answer knows of the reference, or the save has failed")
				Expect(err == nil || errors.Is(err, store.ErrChanged)).To(BeTrue())
			}
		})
	})

	It("keeps tasks that are raised while they are worked on", func(ctx SpecContext) {
		w := saved("shelves/o")
		w.Meta.OwnerReferences = []store.OwnerReference{{Kind: "library.example.com/Shelf", Version: "v1", Name: "shelves/owner", Region: "eu"}}
		w.Constraint.References = []store.Reference{{Field: "metadata.ownerReferences", Kind: store.OwnerRef, Target: "shelves/owner", At: store.Location{Service: "library.example.com", Region: "eu"}}}
		ok(write(w))
		read := func() (tasks []store.Task) {
			_, err := s.ReadTasks(ctx, feed.Cursor{}, all, func(t store.Task) error { tasks = append(tasks, t); return nil })
			ok(err)
			return tasks
		}
		first := read()
		Expect(first).To(HaveLen(1))
		Expect(first[0].Tasks).To(Equal(store.CheckOwners))
		ok(s.RaiseTasks(ctx, []string{"shelves/o"}, store.PendingDelete))
		cleared, err := s.ClearTasks(ctx, "shelves/o", first[0].UUID, first[0].Seen, store.CheckOwners)
		ok(err)
		Expect(cleared).To(BeFalse())
		again := read()
		Expect(again[0].Tasks).To(Equal(store.CheckOwners | store.PendingDelete))
		ok(s.NoteFailure(ctx, "shelves/o", "because", time.Now().Add(time.Hour)))
		Expect(shadow("shelves/o").LastError).To(Equal("because"))
		cleared, err = s.ClearTasks(ctx, "shelves/o", first[0].UUID, again[0].Seen, store.CheckOwners|store.PendingDelete)
		ok(err)
		Expect(cleared).To(BeTrue())
		Expect(read()).To(BeEmpty())
		ownees, err := s.Ownees(ctx, store.Location{Service: "library.example.com", Region: "eu"}, []string{"shelves/owner"}, "", 10)
		ok(err)
		Expect(ownees).To(Equal([]string{"shelves/o"}))

		found, state, err := s.AddOwnee(ctx, "shelves/o", elsewhere)
		ok(err)
		Expect(found).To(BeTrue())
		Expect(state).To(Equal(store.ShadowActive))
		ok(write(saved("shelves/u")))
		w.Constraint.References = append(w.Constraint.References, ref("u", "shelves/u", store.Block))
		w.Body = []byte(`{"u":"shelves/u"}`)
		ok(write(w))
		Expect(shadow("shelves/o").Tasks).To(BeZero())
		w.Constraint.References = w.Constraint.References[:1]
		w.Body = []byte(`{}`)
		ok(write(w))
		Expect(shadow("shelves/o").Tasks).To(Equal(store.CheckOwnees), "a schema reference was dropped, and ownees may need it")
	})
})
