package postgres_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/row"
)

// under returns a context whose writes are under claim.
func under(ctx context.Context, claim int64) context.Context {
	return store.WithClaim(ctx, func() int64 { return claim })
}

// connect opens a connection of the test's own.
func connect(ctx context.Context, dsn string) *pgx.Conn {
	GinkgoHelper()
	c, err := pgx.Connect(ctx, dsn)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() { _ = c.Close(context.Background()) })
	return c
}

// unfenced are the tables that no node writes, and why that needs no fence.
var unfenced = map[string]string{
	"ctl.migrations":       "is written by migrations alone, under their own lock",
	"ctl.deployment_state": "is written by migrations and by a version switch, under the exclusive form of the write fence",
	"ctl.feed_epoch":       "is written by a new epoch, which revokes every claim",
	"ctl.shard_epoch":      "is the fence",
	"ctl.shard_plan":       "is the fence",
}

// reads are the methods of the store that nodes may call and that write nothing, and those that are the fence itself or the store's own life.
var reads = strings.Fields(`Fenced Raise Drop Highest Holds Close Run Feed Ping PoolStats ReferenceMark ReferredElsewhere Tentative Epoch RaiseEpoch Identity
	Get BatchGet List Closure Shadow Shadows CopyOwners LoadCursor Quarantine QuarantineOf
	Owned CountOwned Holdings PolicyWalks PolicyWalk Rates Digests CopyDigests Versions CopyVersions FetchNames FetchShards
	ServicePolicy SearchDigests SearchVersions SearchNames SearchRanges SearchHashes LookSearched Outgoing Suspects CheckOwnee Ownees Unconfirmed ExpiredBlockades Blockades
	HandledReferrers ReferencesTo ReadTasks OwnedRanges CopyRanges OwnedHashes CopyHashes LookOwned LookCopies Verified ResidencyReport`)

var _ = Describe("a claim on shards (O1, P12, I31)", func() {
	var dsn string
	var s *postgres.Store
	BeforeEach(func() {
		dsn = pgtest.Database(GinkgoTB())
		s = openDSN(dsn, "us")
	})
	raise := func(ctx context.Context, shards feed.Range, plan int64, holder string) int64 {
		GinkgoHelper()
		epoch, err := s.Raise(ctx, "syncing", shards, plan, holder)
		Expect(err).NotTo(HaveOccurred())
		return epoch
	}

	It("is looked at by every table that nodes write, in every version", func(ctx SpecContext) {
		v2, err := postgres.Open(ctx, postgres.Config{DSN: dsn, Service: "library.example.com", Region: "us", Version: "v2"})
		Expect(err).NotTo(HaveOccurred())
		defer v2.Close()
		rows, err := connect(ctx, dsn).Query(ctx, `SELECT c.oid::regclass::text, (SELECT pg_get_triggerdef(t.oid) FROM pg_trigger t
				WHERE t.tgrelid = c.oid AND t.tgfoid = 'ctl.check_claim'::regproc AND t.tgenabled = 'O') FROM pg_class c
			WHERE c.relkind IN ('r', 'p') AND c.relnamespace IN ('ctl'::regnamespace, 'v1'::regnamespace, 'v2'::regnamespace)`)
		Expect(err).NotTo(HaveOccurred())
		var table string
		var trigger *string
		exempt := map[string]bool{}
		fenced := 0
		_, err = pgx.ForEachRow(rows, []any{&table, &trigger}, func() error {
			if unfenced[table] != "" {
				exempt[table] = true
				Expect(trigger).To(BeNil(), table)
				return nil
			}
			Expect(trigger).NotTo(BeNil(), "%s has no fence: call ctl.fence in its migration, or say in unfenced why not", table)
			Expect(*trigger).To(And(ContainSubstring("BEFORE INSERT OR DELETE OR UPDATE OR TRUNCATE"), ContainSubstring("FOR EACH STATEMENT")), table)
			fenced++
			return nil
		})
		Expect(err).NotTo(HaveOccurred())
		Expect(exempt).To(HaveLen(len(unfenced)))
		Expect(fenced).To(BeNumerically(">=", 9+2*6))
	})

	It("that has been revoked lets no write pass, by whatever way", func(ctx SpecContext) {
		eu := open("eu")
		start, _, err := eu.Feed().Now(ctx)
		Expect(err).NotTo(HaveOccurred())
		for i := range 20 {
			w := save(fmt.Sprintf("books/%02d", i), `{"title":"x"}`)
			w.Regions = []string{"*"}
			apply(eu, w)
		}
		peer := postgres.Peer{Service: "library.example.com", Region: "eu", Epoch: 1}
		batch := func(empty bool) postgres.Batch {
			b := postgres.Batch{Peer: peer, Shards: ring, Empty: empty}
			r, err := eu.Feed().ReadTuples(ctx, start, ring, "us", func(t []byte) error {
				b.Tuples, b.Rows = append(b.Tuples, t...), b.Rows+1
				return nil
			})
			Expect(err).NotTo(HaveOccurred())
			b.Cursor = r.Cursor
			return b
		}
		rows := batch(false)
		Expect(rows.Rows).To(Equal(20))

		constrained := func(name string) store.Write {
			w := save(name, `{}`)
			w.Constraint = &store.Constraint{}
			return w
		}
		a := apply(s, constrained("own/a")).Resource
		apply(s, constrained("own/gone"))
		gone := apply(s, store.Write{Op: store.Delete, Name: "own/gone", Constraint: &store.Constraint{Tell: true}}).Resource
		there := store.Location{Service: "other.example.com", Region: "us"}
		const tx = "0190a6f0-0000-7000-8000-000000000001"
		question := func() store.Question {
			q, err := s.BeginAttempt(ctx, []string{"own/a"})
			Expect(err).NotTo(HaveOccurred())
			return q["own/a"]
		}
		_, _, err = s.AddOwnee(ctx, "own/a", there)
		Expect(err).NotTo(HaveOccurred())
		_, _, err = s.ClaimVerification(ctx, "eu", "me", 0)
		Expect(err).NotTo(HaveOccurred())
		asked := question()
		_, err = s.Merge(ctx, postgres.Batch{Peer: peer, Shards: ring}) // from here on the epoch of the peer is known
		Expect(err).NotTo(HaveOccurred())

		type write = func(ctx context.Context) error
		writes := map[string][]write{
			"BatchWrite": {
				func(ctx context.Context) error {
					_, err := s.BatchWrite(ctx, []store.Write{{Op: store.Create, Name: fmt.Sprintf("own/%d", rand.Int64()), Type: "Book"}})
					return err
				},
				func(ctx context.Context) error {
					_, err := s.BatchWrite(ctx, []store.Write{save("own/x", fmt.Sprintf(`{"n":%d}`, rand.Int64())), constrained("own/y")})
					return err
				},
				func(ctx context.Context) error {
					_, err := s.BatchWrite(ctx, []store.Write{{Op: store.Delete, Name: "own/x", AllowMissing: true, Constraint: &store.Constraint{}}})
					return err
				},
			},
			"Merge": {
				func(ctx context.Context) error { _, err := s.Merge(ctx, batch(true)); return err },
				func(ctx context.Context) error { _, err := s.Merge(ctx, rows); return err },
				func(ctx context.Context) error { // the cursor alone
					b := rows
					b.Tuples, b.Rows = nil, 0
					_, err := s.Merge(ctx, b)
					return err
				},
			},
			"Overwrite": {func(ctx context.Context) error { _, err := s.Overwrite(ctx, rows, nil); return err }},
			"DeleteExtras": {func(ctx context.Context) error {
				_, err := s.DeleteExtras(ctx, peer, []postgres.NameVersion{{Name: "books/01", Version: store.Version{Epoch: 1, Number: 1}}})
				return err
			}},
			"DropCopies": {func(ctx context.Context) error {
				_, err := s.DropCopies(ctx, "library.example.com", "asia", 10)
				return err
			}},
			"SaveCursor": {func(ctx context.Context) error {
				return s.SaveCursor(ctx, "library.example.com", "eu", ring, rows.Cursor)
			}},
			"Place": {func(ctx context.Context) error {
				_, err := s.Place(ctx, []store.Placement{{Name: "own/a", Type: "Book", OwningRegion: "us", Regions: []string{fmt.Sprint("r", rand.Int64()), "us"}}})
				return err
			}},
			"BeginPolicyWalks": {func(ctx context.Context) error {
				return s.BeginPolicyWalks(ctx, []store.PolicyWalk{{Holder: "h", Says: "x"}})
			}},
			"SavePolicyWalk": {func(ctx context.Context) error {
				_, err := s.SavePolicyWalk(ctx, store.PolicyWalk{Holder: "h"})
				return err
			}},
			"ForgetPolicyWalks": {func(ctx context.Context) error { return s.ForgetPolicyWalks(ctx, []string{"h"}) }},
			"TakeServicePolicy": {func(ctx context.Context) error {
				was, _, err := s.ServicePolicy(ctx)
				if err == nil {
					_, err = s.TakeServicePolicy(ctx, was, fmt.Sprint(rand.Int64()))
				}
				return err
			}},
			"SaveRate":     {func(ctx context.Context) error { return s.SaveRate(ctx, "policy", 1) }},
			"Purge":        {func(ctx context.Context) error { _, err := s.Purge(ctx, time.Hour, 10); return err }},
			"PurgeFences":  {func(ctx context.Context) error { _, err := s.PurgeFences(ctx, time.Hour, 10); return err }},
			"BeginAttempt": {func(ctx context.Context) error { _, err := s.BeginAttempt(ctx, []string{"own/a"}); return err }},
			"Establish": {func(ctx context.Context) error {
				_, err := s.Establish(ctx, store.Establish{Requester: there, Referrer: "loans/1", TxID: tx, Attempt: 1, TTL: time.Hour, Targets: []store.EstablishTarget{{Name: "own/a", Blocking: true}}})
				return err
			}},
			"Confirm": {func(ctx context.Context) error {
				_, err := s.Confirm(ctx, there, []store.Confirmed{{Referrer: "loans/1", Name: "own/a", Blocking: true, TxID: tx}})
				return err
			}},
			"ConfirmEpoch": {func(ctx context.Context) error { return s.ConfirmEpoch(ctx, there, 1) }},
			"AddOwnee":     {func(ctx context.Context) error { _, _, err := s.AddOwnee(ctx, "own/a", there); return err }},
			"CheckBlocked": {func(ctx context.Context) error {
				_, err := s.CheckBlocked(ctx, there, []store.Question{{Name: "x", UUID: a.UUID, Epoch: 1, RowVersion: 1}}, nil)
				return err
			}},
			"CheckSubscriber": {func(ctx context.Context) error {
				_, _, err := s.CheckSubscriber(ctx, there, store.Question{Name: "x", UUID: a.UUID, Epoch: 1, RowVersion: 1})
				return err
			}},
			"RaiseTasks":    {func(ctx context.Context) error { return s.RaiseTasks(ctx, []string{"own/a"}, 1) }},
			"ClearTasks":    {func(ctx context.Context) error { _, err := s.ClearTasks(ctx, "own/a", a.UUID, "", 1); return err }},
			"NoteFailure":   {func(ctx context.Context) error { return s.NoteFailure(ctx, "own/a", "why", time.Now()) }},
			"MarkConfirmed": {func(ctx context.Context) error { return s.MarkConfirmed(ctx, "own/a", nil) }},
			"DropBlockades": {func(ctx context.Context) error {
				return s.DropBlockades(ctx, []store.Blockade{{Name: "own/a", Location: there, Referrer: "loans/1", TxID: tx}})
			}},
			"PruneSource": {
				func(ctx context.Context) error {
					_, err := s.PruneSource(ctx, asked, there, store.Source{Ownee: true})
					return err
				},
				func(ctx context.Context) error {
					_, err := s.PruneSource(ctx, asked, there, store.Source{})
					return err
				},
			},
			"FinishDeletion": {func(ctx context.Context) error {
				_, err := s.FinishDeletion(ctx, "own/gone", gone.UUID, 1, nil)
				return err
			}},
			"BeginSweep": {func(ctx context.Context) error { return s.BeginSweep(ctx, there, 1) }},
			"NoteVerified": {func(ctx context.Context) error {
				return s.NoteVerified(ctx, "eu", time.Now(), []postgres.Verified{{Type: "Book"}})
			}},
			"ClaimVerification": {func(ctx context.Context) error { _, _, err := s.ClaimVerification(ctx, "eu", "me", 0); return err }},
			"SaveVerification":  {func(ctx context.Context) error { _, err := s.SaveVerification(ctx, "eu", "me", "", 0); return err }},
		}
		for m := range reflect.TypeFor[*postgres.Store]().Methods() {
			Expect(slices.Contains(reads, m.Name)).NotTo(Equal(len(writes[m.Name]) > 0), "%s must be in this table of writes, or among the reads", m.Name)
		}

		stale := raise(ctx, feed.Range{From: 0, To: 10}, 1, "a")
		epoch := raise(ctx, feed.Range{From: 0, To: 4096}, 2, "b")
		Expect(epoch).To(BeNumerically(">", stale))
		paths := 0
		for _, name := range slices.Sorted(maps.Keys(writes)) {
			for i, write := range writes[name] {
				before := s.Fenced()
				err := write(under(ctx, stale))
				Expect(store.IsFenced(err)).To(BeTrue(), "%s %d under a revoked claim: %v", name, i, err)
				Expect(store.CodeOf(err)).To(Equal(store.FailedPrecondition), "%s %d: %v", name, i, err)
				Expect(s.Fenced()).To(Equal(before+1), name)
				Expect(write(under(ctx, 0))).To(Satisfy(store.IsFenced), "%s %d before there is a claim", name, i)
				paths++
			}
		}
		GinkgoWriter.Println(paths, "paths refused")
		for _, name := range slices.Sorted(maps.Keys(writes)) {
			for i, write := range writes[name] {
				err := write(under(ctx, epoch))
				Expect(store.IsFenced(err)).To(BeFalse(), "%s %d under the claim in force: %v", name, i, err)
				if name != "ClearTasks" { // has nothing to clear
					Expect(err).NotTo(HaveOccurred(), "%s %d", name, i)
				}
			}
		}
		_, err = s.Get(under(ctx, stale), "own/a")
		Expect(err).NotTo(HaveOccurred(), "reads are free")
		apply(s, save("own/a", `{"by":"a client"}`))
	})

	It("is refused under an older plan, and remembers the newest", func(ctx SpecContext) {
		Expect(s.Highest(ctx, "syncing")).To(BeZero())
		first := raise(ctx, feed.Range{From: 0, To: 100}, 7, "a")
		_, err := s.Raise(ctx, "syncing", feed.Range{From: 99, To: 200}, 6, "b")
		Expect(err).To(MatchError(store.ErrStalePlan))
		Expect(err).To(MatchError(ContainSubstring("claimed by a under plan 7")))
		Expect(s.Holds(ctx, first)).To(BeTrue())
		second := raise(ctx, feed.Range{From: 100, To: 200}, 6, "b")
		Expect(s.Holds(ctx, first)).To(BeTrue())
		other, err := s.Raise(ctx, "search", feed.Range{From: 0, To: 200}, 1, "b")
		Expect(err).NotTo(HaveOccurred())
		again := raise(ctx, feed.Range{From: 50, To: 150}, 7, "a")
		for claim, held := range map[int64]bool{first: false, second: false, other: true, again: true, again + 1: false} {
			Expect(s.Holds(ctx, claim)).To(Equal(held), "%d", claim)
		}
		Expect(s.Drop(ctx, again)).To(Succeed())
		Expect(s.Drop(ctx, again)).To(Succeed())
		Expect(s.Holds(ctx, again)).To(BeFalse())
		Expect(s.Highest(ctx, "syncing")).To(BeEquivalentTo(7))
		Expect(s.Highest(ctx, "search")).To(BeEquivalentTo(1))
		_, err = s.Raise(ctx, "syncing", feed.Range{From: 5, To: 5}, 8, "a")
		Expect(err).To(haveCode(store.InvalidArgument))
	})

	It("ends with the history of the database; later ones have epochs that no other history gave out", func(ctx SpecContext) {
		old := raise(ctx, ring, 1, "a")
		_, err := s.RaiseEpoch(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(s.Holds(ctx, old)).To(BeFalse())
		_, err = s.BatchWrite(under(ctx, old), []store.Write{save("own/a", `{}`)})
		Expect(err).To(Satisfy(store.IsFenced))
		Expect(raise(ctx, ring, 1, "a")).To(BeNumerically("~", time.Now().UnixMilli(), 10*60*1000))
	})

	It("is taken over only after what is in flight under it has ended", func(ctx SpecContext) {
		old := raise(ctx, ring, 1, "a")
		writer := connect(ctx, dsn)
		tx, err := writer.Begin(ctx)
		Expect(err).NotTo(HaveOccurred())
		_, err = tx.Exec(ctx, "SELECT set_config('dbcontroller.claim', $1, false)", fmt.Sprint(old))
		Expect(err).NotTo(HaveOccurred())
		_, err = tx.Exec(ctx, "INSERT INTO ctl.measured_rate (what, rows_per_second) VALUES ('x', 1)")
		Expect(err).NotTo(HaveOccurred())

		var committed atomic.Bool
		raised := make(chan bool, 1)
		go func() {
			defer GinkgoRecover()
			_ = raise(ctx, ring, 2, "b")
			raised <- committed.Load()
		}()
		Eventually(ctx, waitingForClaim(connect(ctx, dsn))).Should(Equal(1))
		Expect(s.Holds(ctx, old)).To(BeTrue())
		committed.Store(true)
		Expect(tx.Commit(ctx)).To(Succeed())
		Expect(<-raised).To(BeTrue(), "the claim was taken over while a transaction was in flight under it")
		Expect(s.Rates(ctx)).To(HaveKey("x"))
	})

	It("is taken from a process that is paused in the middle of a transaction or of a COPY", func(ctx SpecContext) {
		old := raise(ctx, ring, 1, "a")
		idle := connect(ctx, dsn)
		_, err := idle.Exec(ctx, fmt.Sprintf("SET dbcontroller.claim = '%d'; SET search_path = v1", old))
		Expect(err).NotTo(HaveOccurred())
		tx, err := idle.Begin(ctx)
		Expect(err).NotTo(HaveOccurred())
		_, err = tx.Exec(ctx, "INSERT INTO ctl.measured_rate (what, rows_per_second) VALUES ('x', 1)")
		Expect(err).NotTo(HaveOccurred())

		copying := connect(ctx, dsn)
		_, err = copying.Exec(ctx, fmt.Sprintf("SET dbcontroller.claim = '%d'; SET search_path = v1", old))
		Expect(err).NotTo(HaveOccurred())
		reader, writer := io.Pipe()
		stuck := make(chan error, 1)
		go func() {
			_, err := copying.PgConn().CopyFrom(ctx, reader, "COPY resources ("+row.Columns+") FROM STDIN (FORMAT binary)")
			stuck <- err
		}()
		_, err = io.Copy(writer, bytes.NewReader(append([]byte("PGCOPY\n\xff\r\n\x00"), binary.BigEndian.AppendUint64(nil, 0)...)))
		Expect(err).NotTo(HaveOccurred())
		Eventually(ctx, func() (n int, err error) {
			err = connect(ctx, dsn).QueryRow(ctx, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 3518 AND granted").Scan(&n)
			return n, err
		}).Should(Equal(2))

		began := time.Now()
		raise(ctx, ring, 2, "b")
		Expect(time.Since(began)).To(BeNumerically("<", 6*time.Second))
		Expect(tx.Commit(ctx)).NotTo(Succeed())
		_ = writer.Close()
		Expect(<-stuck).To(HaveOccurred())
		Expect(s.Rates(ctx)).NotTo(HaveKey("x"))
	})

	It("that is revoked at any moment leaves no effect behind the one that follows (P12)", func(ctx SpecContext) {
		const shards, writers, rounds = 4, 6, 40
		admin := connect(ctx, dsn)
		_, err := admin.Exec(ctx, `CREATE TABLE audit (name text, version bigint, claim bigint);
			CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
				INSERT INTO public.audit VALUES (NEW.name, NEW.resource_version, current_setting('dbcontroller.claim')::bigint); RETURN NULL; END $$;
			CREATE TRIGGER audit AFTER INSERT OR UPDATE ON v1.resources FOR EACH ROW EXECUTE FUNCTION audit()`)
		Expect(err).NotTo(HaveOccurred())
		name := func(shard int) string { return fmt.Sprintf("own/%d", shard) }

		// A claim on shard i of this test is one on [i, i+1); each writer believes in the claim that it has raised last, whatever has become of it.
		type belief struct {
			sync.Mutex
			shard int
			epoch int64
		}
		beliefs := make([]belief, writers)
		stop := make(chan struct{})
		var accepted, refused atomic.Int64
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				defer GinkgoRecover()
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					beliefs[w].Lock()
					shard, epoch := beliefs[w].shard, beliefs[w].epoch
					beliefs[w].Unlock()
					_, err := s.BatchWrite(under(ctx, epoch), []store.Write{save(name(shard), fmt.Sprintf(`{"by":"%d %d"}`, w, n))})
					switch {
					case err == nil:
						accepted.Add(1)
					case store.IsFenced(err):
						refused.Add(1)
					default:
						Expect(err).NotTo(HaveOccurred())
					}
				}
			})
		}
		type mark struct {
			shard           int
			claim, versions int64
		}
		var marks []mark
		random := rand.New(rand.NewPCG(uint64(GinkgoRandomSeed()), 5))
		for plan := range rounds {
			w, shard := random.IntN(writers), random.IntN(shards)
			epoch := raise(ctx, feed.Range{From: int32(shard), To: int32(shard) + 1}, int64(plan), fmt.Sprint(w))
			m := mark{shard: shard, claim: epoch}
			if r, err := s.Get(ctx, name(shard)); err == nil {
				m.versions = r.Version.Number
			}
			marks = append(marks, m)
			beliefs[w].Lock()
			beliefs[w].shard, beliefs[w].epoch = shard, epoch
			beliefs[w].Unlock()
			before := accepted.Load()
			Eventually(ctx, accepted.Load).Should(BeNumerically(">", before))
		}
		close(stop)
		wg.Wait()
		Expect(accepted.Load()).To(BeNumerically(">=", rounds))
		Expect(refused.Load()).To(BeNumerically(">=", writers), "none of them had a claim when it began")

		rows, err := admin.Query(ctx, "SELECT name, version, claim FROM audit ORDER BY name, version")
		Expect(err).NotTo(HaveOccurred())
		last := map[string]int64{}
		var of string
		var version, claim int64
		_, err = pgx.ForEachRow(rows, []any{&of, &version, &claim}, func() error {
			if claim < last[of] {
				return fmt.Errorf("%s: version %d was written under claim %d, after one under %d", of, version, claim, last[of])
			}
			last[of] = claim
			for _, m := range marks {
				if name(m.shard) == of && version > m.versions && claim < m.claim {
					return fmt.Errorf("%s: version %d under claim %d came after claim %d was raised at version %d", of, version, claim, m.claim, m.versions)
				}
			}
			return nil
		})
		Expect(err).NotTo(HaveOccurred())
		GinkgoWriter.Println(accepted.Load(), "writes accepted,", refused.Load(), "refused,", rounds, "claims raised")
	})

	It("that its node exchanges for another one, because its range changes, costs no write", func(ctx SpecContext) {
		var claim atomic.Int64
		claim.Store(raise(ctx, ring, 1, "a"))
		mine := store.WithClaim(ctx, claim.Load)
		newer := raise(ctx, feed.Range{From: 0, To: 100}, 2, "a")
		go func() { // once the write has been refused
			defer GinkgoRecover()
			Eventually(ctx, s.Fenced).Should(BeNumerically(">", 0))
			claim.Store(newer)
		}()
		_, err := s.BatchWrite(mine, []store.Write{save("own/a", `{}`)})
		Expect(err).NotTo(HaveOccurred())
		claim.Store(0)
		Expect(s.SaveCursor(mine, "library.example.com", "eu", ring, feed.Cursor{Epoch: 1})).To(Satisfy(store.IsFenced))
	})

	It("goes on over a connection that the server has ended meanwhile", func(ctx SpecContext) {
		claim := raise(ctx, ring, 1, "a")
		apply(s, save("own/a", `{}`))
		_, err := connect(ctx, dsn).Exec(ctx, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()")
		Expect(err).NotTo(HaveOccurred())
		_, err = s.BatchWrite(under(ctx, claim), []store.Write{save("own/a", `{"n":1}`)})
		Expect(err).NotTo(HaveOccurred())
		canceled, cancel := context.WithCancel(ctx)
		cancel()
		_, err = s.BatchWrite(under(canceled, 1), []store.Write{save("own/a", `{"n":2}`)})
		Expect(errors.Is(err, context.Canceled)).To(BeTrue(), "%v", err)
	})
})

// waitingForClaim counts the sessions that wait for a claim to be free.
func waitingForClaim(c *pgx.Conn) func(context.Context) (int, error) {
	return func(ctx context.Context) (n int, err error) {
		err = c.QueryRow(ctx, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 3518 AND NOT granted").Scan(&n)
		return n, err
	}
}
