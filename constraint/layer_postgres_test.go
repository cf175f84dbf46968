package constraint_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/constraint"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/policy"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/region"
)

// deployed is one Deployment with its whole store and its mixin, but without nodes: what is asynchronous stays undone.
type deployed struct {
	at    store.Location
	dsn   string
	core  *postgres.Store
	layer *constraint.Store
	store *region.Store
	peers *peers
}

// deploy opens a Deployment; all that are in others reach it, and it reaches them.
func deploy(r *registry.Registry, at store.Location, others map[store.Location]mixin.Peer, edit func(*constraint.LayerConfig)) *deployed {
	GinkgoHelper()
	version := "v1"
	if d, ok := r.View().Deployment(registry.Key{Service: at.Service, Region: at.Region}); ok {
		version = d.Version
	}
	d := &deployed{at: at, dsn: pgtest.Database(GinkgoTB()), peers: newPeers(r, at, version)}
	d.peers.answer = others
	log := slog.New(slog.DiscardHandler)
	var err error
	d.core, err = postgres.Open(GinkgoTB().Context(), postgres.Config{DSN: d.dsn, Service: at.Service, Region: at.Region, Version: version, Ring: 256})
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(d.core.Close)
	current := func() *descriptor.Version { return versionOf(r, at.Service, version) }
	policies := policy.New(current, d.core, log)
	cfg := constraint.LayerConfig{Self: at, Version: current, View: r.View, Core: d.core, Peers: d.peers, Logger: log,
		Owner: func(ctx context.Context, n descriptor.Name, batch []store.Write) (string, error) {
			return d.store.Owner(ctx, n, batch)
		}}
	if edit != nil {
		edit(&cfg)
	}
	d.layer = constraint.Layer(d.core, cfg)
	d.store = region.Layer(d.layer, at.Region, current, policies)
	server, err := mixin.NewServer(mixin.Config{Service: at.Service, Region: at.Region, Version: version, Topology: r, Core: d.core, Store: d.store,
		Owners: d.store, Policies: policies, Changes: d.core.Feed(), Logger: log})
	Expect(err).NotTo(HaveOccurred())
	others[at] = server
	return d
}

func (d *deployed) write(writes ...store.Write) error {
	_, err := d.store.BatchWrite(GinkgoTB().Context(), writes)
	return err
}

func (d *deployed) save(name, text string, args ...any) error {
	return d.write(saveOf(name, text, args...))
}

func (d *deployed) delete(names ...string) error {
	var writes []store.Write
	for _, n := range names {
		writes = append(writes, deleteOf(n))
	}
	return d.write(writes...)
}

func saveOf(name, text string, args ...any) store.Write {
	return store.Write{Op: store.Save, Name: name, Body: body(text, args...)}
}

func deleteOf(name string) store.Write { return store.Write{Op: store.Delete, Name: name} }

// body returns the body of a resource, empty if there is none.
func (d *deployed) body(name string) string {
	GinkgoHelper()
	r, err := d.store.Get(GinkgoTB().Context(), name)
	if store.CodeOf(err) == store.NotFound {
		return ""
	}
	Expect(err).NotTo(HaveOccurred())
	return string(r.Body)
}

func (d *deployed) shadow(name string) *store.Shadow {
	GinkgoHelper()
	h, err := d.core.Shadow(GinkgoTB().Context(), name)
	Expect(err).NotTo(HaveOccurred())
	return h
}

// query returns one value.
func (d *deployed) query(sql string, args ...any) (out string) {
	GinkgoHelper()
	conn, err := pgx.Connect(GinkgoTB().Context(), d.dsn)
	Expect(err).NotTo(HaveOccurred())
	defer conn.Close(context.Background())
	Expect(conn.QueryRow(GinkgoTB().Context(), sql, args...).Scan(&out)).To(Succeed())
	return out
}

// everything is a digest of all that the database stores: every table, and every sequence.
func (d *deployed) everything() string {
	GinkgoHelper()
	return d.query(`SELECT string_agg(c.oid::regclass || ' ' || CASE c.relkind WHEN 'S' THEN (SELECT last_value::text FROM pg_sequences s WHERE (s.schemaname || '.' || s.sequencename)::regclass = c.oid)
			ELSE (xpath('/row/d/text()', query_to_xml(format('SELECT md5(string_agg(t::text || ctid || xmin || xmax, '','' ORDER BY ctid)) AS d FROM %s t', c.oid::regclass), true, true, '')))[1]::text END, E'\n' ORDER BY c.oid)
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname IN ('ctl', 'v1', 'v2') AND c.relkind IN ('r', 'S')`)
}

var succeed = Succeed()

var _ = Describe("the constraint layer on PostgreSQL", func() {
	var d *deployed
	BeforeEach(func() {
		d = deploy(topology("v1", midEU), midEU, map[store.Location]mixin.Peer{}, nil)
	})
	// consistent checks I2, I7 and I8 over the tables: every reference that may not dangle has a target that lives, shadows are where they belong, and
	// the stored references are those of the bodies.
	consistent := func() {
		GinkgoHelper()
		Expect(d.query(`SELECT coalesce(string_agg(r.referrer || ' -> ' || r.target, ', '), '') FROM v1.refs r LEFT JOIN v1.resources t ON t.name = r.target AND t.state = 0
			WHERE r.location = '' AND r.kind <> 2 AND r.behavior NOT IN (4, 5, 6) AND t.name IS NULL`)).To(BeEmpty(), "I2")
		Expect(d.query(`SELECT coalesce(string_agg(name, ', '), '') FROM v1.resources WHERE state = 0 AND (shadow = 1) <> (type <> 'Free')`)).To(BeEmpty(), "I7")
		Expect(d.query(`SELECT coalesce(string_agg(referrer || ' ' || field || ' ' || target, ', '), '') FROM (
				(SELECT referrer, field, target FROM v1.refs WHERE kind = 0 EXCEPT SELECT name, f, t FROM v1.resources, LATERAL (
					SELECT key AS f, value #>> '{}' AS t FROM jsonb_each(body) WHERE key IN ('block', 'unset', 'cascade', 'asyncUnset', 'asyncCascade', 'dangle')
					UNION ALL SELECT 'unsets[]', v FROM jsonb_array_elements_text(body -> 'unsets') AS v
					UNION ALL SELECT 'parts[].node', v ->> 'node' FROM jsonb_array_elements(body -> 'parts') AS v WHERE v ? 'node') b WHERE state = 0)
				UNION ALL (SELECT name, f, t FROM v1.resources, LATERAL (
					SELECT key AS f, value #>> '{}' AS t FROM jsonb_each(body) WHERE key IN ('block', 'unset', 'cascade', 'asyncUnset', 'asyncCascade', 'dangle')
					UNION ALL SELECT 'unsets[]', v FROM jsonb_array_elements_text(body -> 'unsets') AS v
					UNION ALL SELECT 'parts[].node', v ->> 'node' FROM jsonb_array_elements(body -> 'parts') AS v WHERE v ? 'node') b WHERE state = 0 AND type <> 'Free' EXCEPT SELECT referrer, field, target FROM v1.refs WHERE kind = 0)) x`)).To(BeEmpty(), "I8")
	}

	It("creates what refers to each other together, in either order, or nothing of it (F41, I10, X13)", func() {
		a, b := saveOf("nodes/a", `{"block":"nodes/b"}`), saveOf("nodes/b", `{"block":"nodes/a"}`)
		Expect(d.write(a)).To(And(haveCode(store.FailedPrecondition), MatchError(And(ContainSubstring("block"), ContainSubstring("nodes/b does not exist")))))
		Expect(d.write(a, saveOf("nodes/c", `{"block":"nodes/none"}`), b)).To(haveCode(store.FailedPrecondition))
		Expect(d.body("nodes/a")).To(BeEmpty())
		Expect(d.write(a, b)).To(succeed)
		Expect(d.delete("nodes/a")).To(haveCode(store.FailedPrecondition))
		Expect(d.delete("nodes/b", "nodes/a")).To(succeed)
		Expect(d.write(b, a)).To(succeed)
		Expect(d.save("nodes/self", `{"block":"nodes/self"}`)).To(succeed)
		Expect(d.delete("nodes/self")).To(succeed)
		consistent()
	})

	It("refuses to delete what something needs, and names that (F46, I1)", func() {
		Expect(d.write(saveOf("nodes/t", `{}`), saveOf("nodes/x", `{"block":"nodes/t"}`), saveOf("nodes/y", `{"block":"nodes/t"}`))).To(succeed)
		Expect(d.delete("nodes/t")).To(And(haveCode(store.FailedPrecondition), MatchError(And(ContainSubstring("nodes/x (field block)"), ContainSubstring("nodes/y (field block)")))))
		Expect(d.write(deleteOf("nodes/t"), deleteOf("nodes/x"), saveOf("nodes/y", `{}`))).To(succeed, "the final state counts")
		Expect(d.write(saveOf("nodes/t", `{}`), saveOf("nodes/y", `{"block":"nodes/t"}`))).To(succeed)
		Expect(d.write(deleteOf("nodes/t"), saveOf("nodes/y", `{"block":"nodes/t","n":1}`))).To(haveCode(store.FailedPrecondition))
		consistent()
	})

	It("deletes what cascades and clears what is unset in one transaction (F48, F49, I2)", func() {
		Expect(d.write(saveOf("nodes/t", `{}`), saveOf("nodes/k", `{}`),
			saveOf("nodes/c1", `{"cascade":"nodes/t"}`), saveOf("nodes/c2", `{"cascade":"nodes/c1","unset":"nodes/t"}`), saveOf("nodes/c2/children/c", `{}`),
			saveOf("nodes/u", `{"unset":"nodes/t","unsets":["nodes/t","nodes/k","nodes/c1"],"parts":[{"node":"nodes/c2","n":1},{"node":"nodes/k"}],"block":"nodes/k"}`))).To(succeed)
		before, err := d.store.Get(GinkgoTB().Context(), "nodes/u")
		Expect(err).NotTo(HaveOccurred())
		results, err := d.store.BatchWrite(GinkgoTB().Context(), []store.Write{deleteOf("nodes/t")})
		Expect(err).NotTo(HaveOccurred())
		Expect(results).To(HaveLen(1))
		for _, gone := range []string{"nodes/t", "nodes/c1", "nodes/c2", "nodes/c2/children/c"} {
			Expect(d.body(gone)).To(BeEmpty(), gone)
		}
		Expect(d.body("nodes/u")).To(MatchJSON(`{"unsets":["nodes/k"],"parts":[{"n":1},{"node":"nodes/k"}],"block":"nodes/k"}`))
		Expect(d.query("SELECT count(DISTINCT change)::text FROM v1.resources WHERE name IN ('nodes/t', 'nodes/c1', 'nodes/c2', 'nodes/c2/children/c', 'nodes/u')")).To(Equal("1"))
		after, err := d.store.Get(GinkgoTB().Context(), "nodes/u")
		Expect(err).NotTo(HaveOccurred())
		Expect(after.OwningRegion).To(Equal(before.OwningRegion))
		Expect(after.Regions).To(Equal(before.Regions))
		consistent()
	})

	It("does nothing at all when something in the cascade is blocked", func() {
		Expect(d.write(saveOf("nodes/t", `{}`), saveOf("nodes/c", `{"cascade":"nodes/t"}`), saveOf("nodes/b", `{"block":"nodes/c"}`))).To(succeed)
		Expect(d.delete("nodes/t")).To(And(haveCode(store.FailedPrecondition), MatchError(And(ContainSubstring("nodes/c: would be deleted too, but is referenced by nodes/b")))))
		Expect(d.body("nodes/t")).NotTo(BeEmpty())
	})

	It("judges what a save spares by its other references to what goes", func() {
		// nodes/t goes, and with it nodes/s, but for the save that lets go of it; nodes/x goes with nodes/s only.
		batch := func(x string) error {
			Expect(d.write(saveOf("nodes/t", `{}`), saveOf("nodes/u", `{"cascade":"nodes/t"}`), saveOf("nodes/s", `{"cascade":"nodes/t"}`))).To(succeed)
			Expect(d.write(saveOf("nodes/x", `{"cascade":"nodes/s",%s}`, x))).To(succeed)
			return d.write(saveOf("nodes/s", `{"n":1}`), store.Write{Op: store.Delete, Name: "nodes/t"})
		}
		Expect(batch(`"n":1`)).To(succeed)
		Expect(d.body("nodes/x")).NotTo(BeEmpty(), "spared with what it depends on")
		Expect(batch(`"unset":"nodes/u"`)).To(succeed)
		Expect(d.body("nodes/x")).To(MatchJSON(`{"cascade":"nodes/s"}`))
		Expect(batch(`"cascades":["nodes/s","nodes/u"]`)).To(succeed)
		Expect(d.body("nodes/x")).To(BeEmpty(), "whichever way it was reached")
		Expect(batch(`"block":"nodes/u"`)).To(And(haveCode(store.FailedPrecondition), MatchError(And(ContainSubstring("nodes/u: would be deleted too"), ContainSubstring("nodes/x (field block)")))))
		Expect(d.body("nodes/t")).NotTo(BeEmpty())
		consistent()
	})

	It("spares what has let go of it while the deletion was planned", func() {
		var meanwhile func() error
		d = deploy(topology("v1", midEU), midEU, map[store.Location]mixin.Peer{}, func(cfg *constraint.LayerConfig) {
			cfg.Core = hooked{cfg.Core, func() {
				if f := meanwhile; f != nil {
					meanwhile = nil
					Expect(f()).To(succeed)
				}
			}}
		})
		for _, m := range []func() error{
			func() error { return d.save("nodes/c", `{"n":1}`) },
			func() error {
				return d.write(saveOf("nodes/c", `{"n":1}`), saveOf("nodes/new", `{"cascade":"nodes/t"}`))
			},
			func() error { return d.write(saveOf("nodes/c", `{"n":1}`), saveOf("nodes/u", `{"n":2}`)) },
		} {
			Expect(d.write(saveOf("nodes/t", `{}`), saveOf("nodes/c", `{"cascade":"nodes/t"}`), saveOf("nodes/c/children/x", `{}`), saveOf("nodes/u", `{"unset":"nodes/t"}`))).To(succeed)
			meanwhile = m
			Expect(d.delete("nodes/t")).To(succeed)
			Expect(d.body("nodes/c")).To(MatchJSON(`{"n":1}`))
			Expect(d.body("nodes/c/children/x")).To(MatchJSON(`{}`))
			Expect(d.body("nodes/u")).To(Or(MatchJSON(`{}`), MatchJSON(`{"n":2}`)))
			Expect(d.body("nodes/new")).To(BeEmpty())
			consistent()
		}
	})

	It("ends for cycles of cascades (X13)", func() {
		Expect(d.write(saveOf("nodes/a", `{"cascade":"nodes/b"}`), saveOf("nodes/b", `{"cascade":"nodes/c"}`), saveOf("nodes/c", `{"cascade":"nodes/a","unset":"nodes/b"}`))).To(succeed)
		Expect(d.delete("nodes/b")).To(succeed)
		Expect(d.query("SELECT count(*)::text FROM v1.resources WHERE state <> 2")).To(Equal("0"))
	})

	It("keeps the name of what others must still react to (F50, F52, 8.7)", func() {
		Expect(d.write(saveOf("nodes/t", `{}`), saveOf("nodes/u", `{"asyncUnset":"nodes/t"}`), saveOf("nodes/c", `{"asyncCascade":"nodes/t"}`), saveOf("nodes/d", `{"dangle":"nodes/t"}`))).To(succeed)
		Expect(d.delete("nodes/t")).To(succeed)
		Expect(d.body("nodes/t")).To(BeEmpty())
		h := d.shadow("nodes/t")
		Expect(h.State).To(Equal(store.ShadowDeleting))
		Expect(h.DeleteTime).NotTo(BeZero())
		Expect(d.body("nodes/u")).To(MatchJSON(`{"asyncUnset":"nodes/t"}`), "asynchronous")
		Expect(d.body("nodes/d")).To(MatchJSON(`{"dangle":"nodes/t"}`))
		Expect(d.save("nodes/t", `{}`)).To(haveCode(store.FailedPrecondition))
		Expect(d.save("nodes/new", `{"block":"nodes/t"}`)).To(haveCode(store.FailedPrecondition))
		Expect(d.delete("nodes/c")).To(succeed)
		Expect(d.save("nodes/u", `{}`)).To(succeed)
		done, err := d.core.FinishDeletion(GinkgoTB().Context(), h.Name, h.UUID, h.Epoch, nil)
		Expect(err).NotTo(HaveOccurred())
		Expect(done).To(BeTrue())
		Expect(d.save("nodes/t", `{}`)).To(succeed)
	})

	It("lets a reference dangle that may (F50)", func() {
		Expect(d.save("nodes/d", `{"dangle":"nodes/none"}`)).To(succeed)
		Expect(d.shadow("nodes/d").References).To(HaveLen(1))
		Expect(d.write(saveOf("nodes/t", `{}`), saveOf("nodes/e", `{"dangle":"nodes/t"}`))).To(succeed)
		Expect(d.delete("nodes/t")).To(succeed)
		Expect(d.save("nodes/t", `{}`)).To(succeed, "its name is free at once")
	})

	It("treats the parent as its type says (F51)", func() {
		Expect(d.save("nodes/n/children/c", `{}`)).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("name: nodes/n does not exist"))))
		Expect(d.write(saveOf("nodes/n/children/c", `{}`), saveOf("nodes/n", `{}`), saveOf("nodes/n/guards/g", `{}`))).To(succeed)
		Expect(d.delete("nodes/n")).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("nodes/n/guards/g (field name)"))))
		Expect(d.delete("nodes/n/guards/g")).To(succeed)
		Expect(d.delete("nodes/n")).To(succeed)
		Expect(d.body("nodes/n/children/c")).To(BeEmpty())
	})

	It("keeps a resource readable whose deletion is asynchronous (F53)", func() {
		Expect(d.write(saveOf("nodes/t", `{}`), saveOf("slows/s", `{"block":"nodes/t"}`))).To(succeed)
		Expect(d.delete("slows/s")).To(succeed)
		r, err := d.store.Get(GinkgoTB().Context(), "slows/s")
		Expect(err).NotTo(HaveOccurred())
		Expect(r.State).To(Equal(store.Deleting))
		Expect(r.Body).To(MatchJSON(`{"block":"nodes/t"}`))
		Expect(d.delete("slows/s")).To(succeed, "it is being deleted already")
		Expect(d.save("slows/s", `{}`)).To(haveCode(store.FailedPrecondition))
	})

	It("honors block_deletion, of what cascades too (F55)", func() {
		yes, no := true, false
		w := saveOf("nodes/c", `{"cascade":"nodes/t"}`)
		w.BlockDeletion = &yes
		Expect(d.write(saveOf("nodes/t", `{}`), w)).To(succeed)
		Expect(d.delete("nodes/c")).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("blocked by the service"))))
		Expect(d.delete("nodes/t")).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("nodes/c: would be deleted too"))))
		w.BlockDeletion = &no
		Expect(d.write(w)).To(succeed)
		Expect(d.delete("nodes/t")).To(succeed)
	})

	It("leaves alone what opts out (F56)", func() {
		Expect(d.write(saveOf("frees/f", `{"block":"nodes/none"}`), saveOf("nodes/a", `{"free":"frees/f"}`))).To(succeed)
		_, err := d.core.Shadow(GinkgoTB().Context(), "frees/f")
		Expect(err).To(haveCode(store.NotFound))
		Expect(d.shadow("nodes/a").References).To(BeEmpty())
		Expect(d.delete("frees/f")).To(succeed)
		consistent()
	})

	It("raises the tasks that remain (F42)", func() {
		w := saveOf("nodes/a", `{}`)
		w.Meta.OwnerReferences = []store.OwnerReference{{Kind: "low.example.com/Item", Version: "v1", Name: "items/i", Region: "eu"}}
		Expect(d.write(w)).To(succeed)
		h := d.shadow("nodes/a")
		Expect(h.Tasks).To(Equal(store.CheckOwners))
		Expect(h.References).To(ConsistOf(store.Reference{Field: "metadata.ownerReferences", Kind: store.OwnerRef, At: lowEU, Target: "items/i"}))
	})

	It("keeps everything but what a mask names, and its references (I8)", func() {
		Expect(d.write(saveOf("nodes/a", `{}`), saveOf("nodes/b", `{}`), saveOf("nodes/m", `{"block":"nodes/a","unset":"nodes/a"}`))).To(succeed)
		w := store.Write{Op: store.Update, Name: "nodes/m", Body: body(`{"unset":"nodes/b"}`), Mask: []string{"unset"}}
		var wg sync.WaitGroup
		for i := range 8 { // they meet
			wg.Go(func() {
				defer GinkgoRecover()
				w := w
				w.Body = body(`{"unset":"nodes/b","n%d":1}`, i)
				w.Mask = []string{"unset", fmt.Sprintf("n%d", i)}
				Expect(d.write(w)).To(succeed)
			})
		}
		wg.Wait()
		Expect(d.body("nodes/m")).To(MatchJSON(`{"block":"nodes/a","unset":"nodes/b","n0":1,"n1":1,"n2":1,"n3":1,"n4":1,"n5":1,"n6":1,"n7":1}`))
		consistent()
	})

	It("refuses a deletion that takes too much along, and does one that is just small enough (8.27)", func(ctx SpecContext) {
		Expect(d.save("nodes/t", `{}`)).To(succeed)
		var writes []store.Write
		for i := range 999 {
			writes = append(writes, saveOf(fmt.Sprintf("nodes/c%d", i), `{"cascade":"nodes/t"}`))
		}
		Expect(d.write(writes...)).To(succeed)
		Expect(d.save("nodes/more", `{"unset":"nodes/t"}`)).To(succeed)
		Expect(d.delete("nodes/t")).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("AsyncCascadeDelete"))))
		p, err := d.layer.PlanDelete(ctx, "nodes/t")
		Expect(err).NotTo(HaveOccurred())
		Expect(p.TooLarge).To(BeTrue())
		Expect(p.Deployments).To(ConsistOf(And(HaveField("Deletes", 1000), HaveField("Unsets", 1), HaveField("Deleted", HaveLen(1000)))))
		Expect(d.save("nodes/more", `{}`)).To(succeed)
		Expect(d.delete("nodes/t")).To(succeed)

		Expect(d.save("nodes/0", `{}`)).To(succeed)
		for i := range 17 {
			Expect(d.save(fmt.Sprintf("nodes/%d", i+1), `{"cascade":"nodes/%d"}`, i)).To(succeed)
		}
		Expect(d.delete("nodes/0")).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("16 levels"))))
		Expect(d.delete("nodes/1")).To(succeed)
	})

	It("holds while everything is saved and deleted at the same time (I1, I2, I8, I10)", func(ctx SpecContext) {
		seed := GinkgoRandomSeed()
		var wg sync.WaitGroup
		for worker := range 6 {
			wg.Go(func() {
				defer GinkgoRecover()
				rnd := rand.New(rand.NewPCG(uint64(seed), uint64(worker)))
				name := func() string { return fmt.Sprintf("nodes/%d", rnd.IntN(12)) }
				for range 80 {
					var err error
					switch rnd.IntN(5) {
					case 0, 1:
						err = d.write(saveOf(name(), `{"n":%d}`, rnd.IntN(100)))
					case 2:
						n := name()
						field := []string{"block", "unset", "cascade", "dangle"}[rnd.IntN(4)]
						err = d.write(saveOf(n, `{"%s":"%s","unsets":["%s"]}`, field, name(), name()))
					case 3:
						err = d.delete(name())
					case 4:
						a, b := name(), name()
						if a != b {
							err = d.write(deleteOf(a), saveOf(b, `{"block":"%s"}`, name()))
						}
					}
					Expect(store.CodeOf(err)).To(BeElementOf(store.Code(0), store.NotFound, store.FailedPrecondition, store.AlreadyExists), "seed %d: %v", seed, err)
				}
			})
		}
		wg.Wait()
		consistent()
	})

	It("plans what would happen, and writes nothing at all", func(ctx SpecContext) {
		Expect(d.write(saveOf("nodes/t", `{}`), saveOf("nodes/c", `{"cascade":"nodes/t"}`), saveOf("nodes/u", `{"unset":"nodes/c"}`), saveOf("nodes/b", `{"block":"nodes/t"}`),
			saveOf("nodes/ac", `{"asyncCascade":"nodes/c"}`), saveOf("nodes/ac/children/x", `{}`), saveOf("nodes/au", `{"asyncUnset":"nodes/ac"}`), saveOf("nodes/loop", `{"asyncCascade":"nodes/ac","asyncUnset":"nodes/t"}`))).To(succeed)
		before := d.everything()
		p, err := d.layer.PlanDelete(ctx, "nodes/t")
		Expect(err).NotTo(HaveOccurred())
		Expect(d.everything()).To(Equal(before))
		Expect(p.Deployments).To(HaveLen(1))
		Expect(p.Deployments[0].Deleted).To(ConsistOf(
			constraint.PlannedChange{Name: "nodes/t", Type: "Node"},
			constraint.PlannedChange{Name: "nodes/c", Type: "Node", Field: "cascade", Target: "nodes/t"},
			constraint.PlannedChange{Name: "nodes/ac", Type: "Node", Field: "asyncCascade", Target: "nodes/c", Async: true},
			constraint.PlannedChange{Name: "nodes/ac/children/x", Type: "Child", Field: "name", Target: "nodes/ac", Async: true},
			constraint.PlannedChange{Name: "nodes/loop", Type: "Node", Field: "asyncCascade", Target: "nodes/ac", Async: true},
		))
		Expect(p.Deployments[0].Cleared).To(ConsistOf(
			constraint.PlannedChange{Name: "nodes/u", Type: "Node", Field: "unset", Target: "nodes/c"},
			constraint.PlannedChange{Name: "nodes/au", Type: "Node", Field: "asyncUnset", Target: "nodes/ac", Async: true},
		))
		Expect(p.Deployments[0].Deletes).To(Equal(5))
		Expect(p.Deployments[0].Unsets).To(Equal(2))
		Expect(p.Blockers).To(ConsistOf(store.Blocker{Target: "nodes/t", Location: midEU, Referrer: "nodes/b", Field: "block"}))
		_, err = d.layer.PlanDelete(ctx, "nodes/none")
		Expect(err).To(haveCode(store.NotFound))
	})
})

var _ = Describe("constraint layers of several Deployments", func() {
	var eu, us, low *deployed
	var all map[store.Location]mixin.Peer
	BeforeEach(func() {
		reg := topology("v2", midEU, midUS, lowEU)
		all = map[store.Location]mixin.Peer{}
		eu, us, low = deploy(reg, midEU, all, nil), deploy(reg, midUS, all, nil), deploy(reg, lowEU, all, nil)
	})
	cut := func(at store.Location) (heal func()) {
		was := all[at]
		all[at] = away{was}
		return func() { all[at] = was }
	}

	It("establish references across regions of one service (F43, F42, I4, I5)", func() {
		Expect(eu.save("nodes/n", `{"site":"regions/us/sites/s"}`)).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("site: regions/us/sites/s (mid.example.com/us) does not exist"))))
		Expect(us.save("regions/us/sites/s", `{}`)).To(succeed)
		Expect(eu.save("nodes/n", `{"site":"regions/us/sites/s"}`)).To(succeed)
		Expect(eu.shadow("nodes/n").Tasks).To(Equal(store.ConfirmBlockades))
		h := us.shadow("regions/us/sites/s")
		Expect(h.Sources).To(ConsistOf(store.Source{Location: midEU, Blocking: true}))
		Expect(h.Blockades).To(ConsistOf(HaveField("Referrer", "nodes/n")))
		Expect(us.delete("regions/us/sites/s")).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("nodes/n in mid.example.com/eu that may not have ended"))), "F14, I3")
	})

	It("spell names as the other side knows them (F44, F45, F47)", func() {
		Expect(low.save("projects/p", `{"policy":{"enabledRegions":["eu"],"defaultControlRegion":"eu"}}`)).To(succeed)
		Expect(low.write(saveOf("projects/p/keys/k", `{}`), saveOf("things/i", `{}`))).To(succeed)
		Expect(eu.save("nodes/n", `{"secrets":["projects/p/secrets/k"],"item":"items/i"}`)).To(succeed)
		Expect(low.shadow("projects/p/keys/k").Sources).To(ConsistOf(store.Source{Location: midEU, Blocking: true}))
		Expect(low.shadow("things/i").Sources).To(ConsistOf(store.Source{Location: midEU, Subscriber: true}))
		confirm(low, eu, "nodes/n", "projects/p/keys/k", "things/i")
		Expect(low.delete("projects/p/keys/k")).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("nodes/n in mid.example.com/eu"))), "F13")
		Expect(low.delete("projects/p")).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("projects/p/keys/k: would be deleted too"))))
		Expect(eu.save("nodes/n", `{"item":"items/i"}`)).To(succeed, "dropping it calls nobody")
		Expect(low.delete("projects/p")).To(succeed)
		Expect(low.body("projects/p/keys/k")).To(BeEmpty())
		Expect(low.delete("things/i")).To(succeed)
		Expect(low.shadow("things/i").State).To(Equal(store.ShadowDeleting), "somebody must be told")
		Expect(eu.save("nodes/late", `{"item":"items/i"}`)).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("item"))), "I2, X14")
	})

	It("write nothing while the owner is away, and delete nothing while a source is (X8, X9)", func() {
		Expect(us.save("regions/us/sites/s", `{}`)).To(succeed)
		heal := cut(midUS)
		Expect(eu.save("nodes/n", `{"site":"regions/us/sites/s"}`)).To(haveCode(store.Unavailable))
		Expect(eu.body("nodes/n")).To(BeEmpty())
		heal()
		Expect(eu.save("nodes/n", `{"site":"regions/us/sites/s"}`)).To(succeed)
		confirm(us, eu, "nodes/n", "regions/us/sites/s")
		heal = cut(midEU)
		Expect(us.delete("regions/us/sites/s")).To(And(haveCode(store.Unavailable), MatchError(ContainSubstring("mid.example.com/eu"))))
		heal()
		Expect(us.delete("regions/us/sites/s")).To(haveCode(store.FailedPrecondition))
		Expect(eu.delete("nodes/n")).To(succeed)
		Expect(us.delete("regions/us/sites/s")).To(succeed)
	})

	It("fail whole when one of two buckets refuses; what the other granted expires (X4, X1)", func() {
		Expect(us.save("regions/us/sites/s", `{}`)).To(succeed)
		Expect(eu.save("nodes/n", `{"site":"regions/us/sites/s","item":"items/none"}`)).To(haveCode(store.FailedPrecondition))
		Expect(eu.body("nodes/n")).To(BeEmpty())
		Expect(us.shadow("regions/us/sites/s").Blockades).To(HaveLen(1))
	})

	It("never take a read copy as evidence (I13)", func() {
		// us has no thing of that name, whatever it may hold a copy of: only the owner is asked.
		Expect(low.save("things/i", `{}`)).To(succeed)
		Expect(low.delete("things/i")).To(succeed)
		Expect(us.save("regions/us/sites/s", `{}`)).To(succeed)
		Expect(eu.query("SELECT count(*)::text FROM v1.resources WHERE name = 'regions/us/sites/s'")).To(Equal("0"))
		Expect(eu.save("nodes/n", `{"site":"regions/us/sites/s"}`)).To(succeed, "nor its absence")
		Expect(eu.save("nodes/m", `{"item":"items/i"}`)).To(haveCode(store.FailedPrecondition))
	})

	It("are serializable when each deletes what the other one refers to (X7)", func(ctx SpecContext) {
		for i := range 20 {
			a, b := fmt.Sprintf("regions/eu/sites/a%d", i), fmt.Sprintf("regions/us/sites/b%d", i)
			Expect(eu.save(a, `{}`)).To(succeed)
			Expect(us.save(b, `{}`)).To(succeed)
			var wg sync.WaitGroup
			var saveErr, deleteErr error
			wg.Go(func() { saveErr = eu.save(a, `{"near":"%s"}`, b) })
			wg.Go(func() { deleteErr = us.delete(b) })
			wg.Wait()
			if deleteErr == nil {
				Expect(saveErr).To(haveCode(store.FailedPrecondition), b)
				Expect(eu.body(a)).To(MatchJSON(`{}`))
			} else {
				Expect(deleteErr).To(haveCode(store.FailedPrecondition))
				Expect(us.body(b)).NotTo(BeEmpty())
			}
		}
	})

	It("plan over all of them without writing anywhere", func(ctx SpecContext) {
		Expect(us.save("regions/us/sites/s", `{}`)).To(succeed)
		Expect(eu.save("nodes/n", `{"site":"regions/us/sites/s"}`)).To(succeed)
		Expect(eu.save("regions/eu/sites/f", `{"fellow":"regions/us/sites/s"}`)).To(succeed)
		confirm(us, eu, "nodes/n", "regions/us/sites/s")
		before := []string{eu.everything(), us.everything(), low.everything()}
		p, err := us.layer.PlanDelete(ctx, "regions/us/sites/s")
		Expect(err).NotTo(HaveOccurred())
		Expect([]string{eu.everything(), us.everything(), low.everything()}).To(Equal(before))
		Expect(p.Unasked).To(BeEmpty())
		Expect(p.Deployments).To(HaveLen(2))
		Expect(p.Deployments[1].Location).To(Equal(midEU))
		Expect(p.Deployments[1].Deleted).To(ConsistOf(constraint.PlannedChange{Name: "regions/eu/sites/f", Type: "Site", Field: "fellow", Target: "regions/us/sites/s", Async: true}))
		Expect(p.Blockers).To(ContainElement(And(HaveField("Location", midEU), HaveField("Referrer", "nodes/n"), HaveField("TentativeUntil", time.Time{}))))
	})

	It("ask about a parent in another region once (F43, F51)", func(ctx SpecContext) {
		Expect(us.save("nodes/n/regions/us/spots/s", `{}`)).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("name: nodes/n (mid.example.com/eu) does not exist"))))
		Expect(eu.save("nodes/n", `{}`)).To(succeed)
		Expect(us.save("nodes/n/regions/us/spots/s", `{}`)).To(succeed)
		Expect(us.save("nodes/n/regions/us/spots/s", `{"n":1}`)).To(succeed)
		Expect(eu.shadow("nodes/n").Blockades).To(HaveLen(1))
		Expect(eu.shadow("nodes/n").Sources).To(ConsistOf(store.Source{Location: midUS, Subscriber: true}))
		refs, _, err := us.core.ReferencesTo(ctx, midEU, "", 10)
		Expect(err).NotTo(HaveOccurred())
		Expect(refs).To(HaveLen(1), "to be confirmed after a failover")
	})

	It("need a new permission for a reference that was dropped meanwhile (I1, I2)", func() {
		var meanwhile func()
		reg := topology("v1", midEU, midUS)
		all := map[store.Location]mixin.Peer{}
		us = deploy(reg, midUS, all, nil)
		eu = deploy(reg, midEU, all, func(cfg *constraint.LayerConfig) {
			cfg.Core = hooked{cfg.Core, func() {
				if f := meanwhile; f != nil {
					meanwhile = nil
					f()
				}
			}}
		})
		Expect(us.save("regions/us/sites/s", `{}`)).To(succeed)
		Expect(eu.save("nodes/n", `{"site":"regions/us/sites/s"}`)).To(succeed)
		confirm(us, eu, "nodes/n", "regions/us/sites/s")
		meanwhile = func() {
			Expect(eu.save("nodes/n", `{}`)).To(succeed)
			Expect(us.delete("regions/us/sites/s")).To(succeed)
		}
		Expect(eu.save("nodes/n", `{"site":"regions/us/sites/s","n":1}`)).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("does not exist"))))
		Expect(eu.body("nodes/n")).To(MatchJSON(`{}`))
	})

	It("follow a deletion from one to the next, and back (F68, X13)", func(ctx SpecContext) {
		Expect(low.save("things/i", `{}`)).To(succeed)
		Expect(eu.save("nodes/n", `{"item":"items/i"}`)).To(succeed)
		Expect(us.save("regions/us/sites/x", `{"node":"nodes/n"}`)).To(succeed)
		Expect(eu.save("regions/eu/sites/y", `{"fellow":"regions/us/sites/x"}`)).To(succeed)
		Expect(us.save("regions/us/sites/z", `{"fellow":"regions/eu/sites/y"}`)).To(succeed)
		Expect(us.save("regions/us/sites/x", `{"node":"nodes/n","fellow":"regions/us/sites/z"}`)).To(succeed, "a cycle")
		before := []string{eu.everything(), us.everything(), low.everything()}
		p, err := low.layer.PlanDelete(ctx, "things/i")
		Expect(err).NotTo(HaveOccurred())
		Expect([]string{eu.everything(), us.everything(), low.everything()}).To(Equal(before))
		Expect(p.Unasked).To(BeEmpty())
		names := map[store.Location][]string{}
		for _, d := range p.Deployments {
			for _, c := range d.Deleted {
				names[d.Location] = append(names[d.Location], c.Name)
			}
		}
		Expect(names).To(HaveLen(3))
		Expect(names[lowEU]).To(ConsistOf("things/i"))
		Expect(names[midEU]).To(ConsistOf("nodes/n", "regions/eu/sites/y"))
		Expect(names[midUS]).To(ConsistOf("regions/us/sites/x", "regions/us/sites/z"))
	})
})

// hooked lets something happen after the layer has read what it plans with.
type hooked struct {
	constraint.LayerCore
	after func()
}

func (h hooked) Closure(ctx context.Context, roots []string, limit, depth, async int) (*store.Closure, error) {
	c, err := h.LayerCore.Closure(ctx, roots, limit, depth, async)
	h.after()
	return c, err
}

func (h hooked) Outgoing(ctx context.Context, names []string) (map[string][]store.Reference, store.Mark, error) {
	refs, mark, err := h.LayerCore.Outgoing(ctx, names)
	h.after()
	return refs, mark, err
}

// away is a peer that does not answer.
type away struct{ mixin.Peer }

var errAway = &store.Error{Code: store.Unavailable, Cause: errors.New("no route to host")}

func (away) EstablishReferences(context.Context, *v1.EstablishReferencesRequest) (*v1.EstablishReferencesResponse, error) {
	return nil, errAway
}

func (away) CheckIfResourceIsBlocked(context.Context, *v1.CheckIfResourceIsBlockedRequest) (*v1.CheckIfResourceIsBlockedResponse, error) {
	return nil, errAway
}

// confirm does what the owned-pending handler of from would do: the tentative blockades of a referrer give way.
func confirm(owner, from *deployed, referrer string, targets ...string) {
	GinkgoHelper()
	unconfirmed, err := from.core.Unconfirmed(GinkgoTB().Context(), referrer)
	Expect(err).NotTo(HaveOccurred())
	var refs []store.Confirmed
	for _, t := range targets {
		refs = append(refs, store.Confirmed{Referrer: referrer, Name: t, Blocking: true, TxID: unconfirmed[0].Grant.TxID})
	}
	missing, err := owner.core.Confirm(GinkgoTB().Context(), from.at, refs)
	Expect(err).NotTo(HaveOccurred())
	Expect(missing).To(BeEmpty())
	Expect(from.core.MarkConfirmed(GinkgoTB().Context(), referrer, unconfirmed)).To(Succeed())
}
