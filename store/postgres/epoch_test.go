package postgres_test

import (
	"bytes"
	"context"
	"os/exec"
	"path/filepath"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

var _ = Describe("the feed epoch", func() {
	It("rises when a standby that lost the last commits is promoted, and its cursors are lost", func(ctx SpecContext) {
		primary := pgtest.Server(GinkgoTB(), pgserver.Config{Version: "15"})
		Expect(primary.CreateDatabase(ctx, "eu")).To(Succeed())
		old := openDSN(primary.DSN("eu"), "eu")
		apply(old, save("shelves/s/books/kept", `{"v":1}`))
		standby := pgtest.Standby(GinkgoTB(), primary, pgserver.Config{Version: "15"})
		Expect(standby.CatchUp(ctx)).To(Succeed())
		Expect(standby.CutReplication(ctx)).To(Succeed())

		lost := apply(old, save("shelves/s/books/kept", `{"v":2}`)).Resource
		apply(old, save("shelves/s/books/lost", `{}`))
		cursor, _, err := old.Feed().Now(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(primary.Kill()).To(Succeed())
		Expect(standby.Promote(ctx)).To(Succeed())

		survivor := openDSN(standby.DSN("eu"), "eu")
		epoch, err := survivor.Epoch(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(epoch).To(BeNumerically(">", 1))
		_, err = survivor.Feed().ReadResources(ctx, cursor, feed.Selection{}, nil)
		Expect(err).To(MatchError(feed.ErrCursorLost))
		again := apply(survivor, save("shelves/s/books/kept", `{"v":3}`)).Resource
		Expect(again.Version.Number).To(Equal(lost.Version.Number), "the number is given twice")
		Expect(again.Version.Compare(lost.Version)).To(Equal(1), "and yet the version is newer")
	})

	It("is refused on a standby", func(ctx SpecContext) {
		primary := pgtest.Server(GinkgoTB(), pgserver.Config{Version: "15"})
		Expect(primary.CreateDatabase(ctx, "eu")).To(Succeed())
		openDSN(primary.DSN("eu"), "eu")
		standby := pgtest.Standby(GinkgoTB(), primary, pgserver.Config{Version: "15"})
		Expect(standby.CatchUp(ctx)).To(Succeed())
		_, err := tryOpen(standby.DSN("eu"), "eu")
		Expect(err).To(haveCode(store.Unavailable))
	})

	It("rises by itself after a dump and reload, where every row lies in the future, and each is delivered", func(ctx SpecContext) {
		old := pgtest.Server(GinkgoTB(), pgserver.Config{Version: "15"}) // pg_dump refuses servers newer than itself
		Expect(old.CreateDatabase(ctx, "eu")).To(Succeed())
		s := openDSN(old.DSN("eu"), "eu")
		for range 500 { // push the ids of this cluster ahead of a young one's
			apply(s, save("shelves/s/books/a", `{"n":1}`))
			apply(s, save("shelves/s/books/a", `{"n":2}`))
		}
		young := pgtest.Server(GinkgoTB(), pgserver.Config{Version: "15"})
		Expect(young.CreateDatabase(ctx, "eu")).To(Succeed())
		copyDatabase(ctx, old.DSN("eu"), young.DSN("eu"))
		conn, err := young.Connect(ctx, "eu")
		Expect(err).NotTo(HaveOccurred())
		defer conn.Close(ctx)
		future := func() (n int) {
			GinkgoHelper()
			Expect(conn.QueryRow(ctx, "SELECT count(*) FROM v1.resources WHERE change >= pg_snapshot_xmax(pg_current_snapshot())").Scan(&n)).To(Succeed())
			return n
		}
		Expect(future()).To(Equal(1))

		restored := openDSN(young.DSN("eu"), "eu")
		Expect(future()).To(BeZero())
		epoch, err := restored.Epoch(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(epoch).To(BeNumerically(">", 1))
		cursor, _, err := restored.Feed().Now(ctx)
		Expect(err).NotTo(HaveOccurred())
		apply(restored, save("shelves/s/books/a", `{"n":3}`))
		var seen []string
		_, err = restored.Feed().ReadResources(ctx, cursor, feed.Selection{}, func(r *store.Resource) error {
			seen = append(seen, r.Name)
			return nil
		})
		Expect(err).NotTo(HaveOccurred())
		Expect(seen).To(Equal([]string{"shelves/s/books/a"}))
	})

	It("rises by hand", func(ctx SpecContext) {
		s := open("eu")
		c, _, err := s.Feed().Now(ctx)
		Expect(err).NotTo(HaveOccurred())
		epoch, err := s.RaiseEpoch(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(epoch).To(BeNumerically(">", 1))
		again, err := s.RaiseEpoch(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(again).To(BeNumerically(">", epoch), "also within a second")
		_, err = s.Feed().ReadResources(ctx, c, feed.Selection{}, nil)
		Expect(err).To(MatchError(feed.ErrCursorLost))
	})
})

var _ = Describe("the policy of the service", func() {
	It("is the first one until another is taken over just that", func(ctx SpecContext) {
		s := open("us")
		_, known, err := s.ServicePolicy(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(known).To(BeFalse())
		take := func(was, now string) bool {
			taken, err := s.TakeServicePolicy(ctx, was, now)
			Expect(err).NotTo(HaveOccurred())
			return taken
		}
		is := func() string {
			policy, known, err := s.ServicePolicy(ctx)
			Expect(err).NotTo(HaveOccurred())
			Expect(known).To(BeTrue())
			return policy
		}
		Expect(take("a", "a")).To(BeTrue())
		Expect(take("x", "b")).To(BeFalse())
		Expect(is()).To(Equal("a"))
		Expect(take("a", "b")).To(BeTrue())
		Expect(take("a", "c")).To(BeFalse(), "somebody else was first")
		Expect(take("b", "")).To(BeTrue(), "none is a policy, too")
		Expect(is()).To(BeEmpty())
	})
})

var _ = Describe("opening", func() {
	It("refuses the database of another Deployment, ring or version name, and an unreadable DSN without repeating it", func() {
		dsn := pgtest.Database(GinkgoTB())
		openDSN(dsn, "eu")
		_, err := tryOpen(dsn, "us")
		Expect(err).To(haveCode(store.FailedPrecondition))
		Expect(err).To(MatchError(ContainSubstring("belongs to library.example.com in eu")))
		_, err = tryOpen("postgres://user:hunter2@[bad", "us")
		Expect(err).To(HaveOccurred())
		Expect(err.Error()).NotTo(ContainSubstring("hunter2"))
	})

	It("migrates once when many processes start at the same time", func() {
		dsn := pgtest.Database(GinkgoTB())
		errs := make(chan error, 8)
		for range cap(errs) {
			go func() {
				s, err := tryOpen(dsn, "eu")
				if err == nil {
					s.Close()
				}
				errs <- err
			}()
		}
		for range cap(errs) {
			Expect(<-errs).To(Succeed())
		}
	})
})

// copyDatabase is pg_dump piped into psql.
func copyDatabase(ctx context.Context, from, to string) {
	GinkgoHelper()
	bin, err := pgserver.Find("15")
	Expect(err).NotTo(HaveOccurred())
	dump, err := exec.CommandContext(ctx, filepath.Join(bin, "pg_dump"), from).Output()
	Expect(err).NotTo(HaveOccurred())
	load := exec.CommandContext(ctx, filepath.Join(bin, "psql"), "-v", "ON_ERROR_STOP=1", "-q", to)
	load.Stdin = bytes.NewReader(dump)
	out, err := load.CombinedOutput()
	Expect(err).NotTo(HaveOccurred(), "%s", out)
}
