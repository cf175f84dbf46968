package apiserver

import (
	"context"
	"net/http"
	"sync"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/store"
)

// observed notes how fresh the reads had to be.
type observed struct {
	store.Store
	mu    sync.Mutex
	fresh []bool
	seen  []store.Version
}

func (a *observed) note(ctx context.Context) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fresh, a.seen = append(a.fresh, store.IsFresh(ctx)), append(a.seen, store.MinVersion(ctx))
}

func (a *observed) Get(ctx context.Context, name string) (*store.Resource, error) {
	a.note(ctx)
	return a.Store.Get(ctx, name)
}

func (a *observed) BatchGet(ctx context.Context, names []string) ([]*store.Resource, error) {
	a.note(ctx)
	return a.Store.BatchGet(ctx, names)
}

func (a *observed) List(ctx context.Context, q store.Query) (*store.Page, error) {
	a.note(ctx)
	return a.Store.List(ctx, q)
}

// last returns what the last read was asked for.
func (a *observed) last() (fresh bool, seen store.Version) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.fresh[len(a.fresh)-1], a.seen[len(a.seen)-1]
}

var _ = Describe("How fresh reads are (F37)", func() {
	It("lets a cache answer what users read, nothing older than they have seen, and nothing that a write depends on", func() {
		reads := &observed{}
		w := newWorld(true, func(c *Config) { reads.Store, c.Store = c.Store, reads }, "eu")
		eu := w.rest("eu")
		created := eu.do("POST", "/sections/admin/packages?id=apt", `{"version": "1"}`)
		Expect(created.status).To(Equal(http.StatusOK), created.text)
		etag := created.header.Get("ETag")
		v, err := store.ParseETag(created.json()["etag"].(string))
		Expect(err).NotTo(HaveOccurred())

		for _, path := range []string{apt, "/sections/admin/packages", ":batchGet?names=sections/admin/packages/apt"} {
			Expect(eu.do("GET", path, "").status).To(Equal(http.StatusOK), path)
			fresh, seen := reads.last()
			Expect(fresh).To(BeFalse(), path)
			Expect(seen).To(Equal(store.Version{}), path)
			Expect(eu.do("GET", path, "", dbcontrollerv1.MinVersionHeader, etag).status).To(Equal(http.StatusOK), path)
			_, seen = reads.last()
			Expect(seen).To(Equal(v), path)
		}
		Expect(eu.do("GET", apt+"?minVersion="+v.ETag(), "").status).To(Equal(http.StatusOK))
		_, seen := reads.last()
		Expect(seen).To(Equal(v))
		Expect(eu.do("GET", apt+"?min_version=x", "").status).To(Equal(http.StatusBadRequest))
		Expect(eu.do("GET", apt, "", dbcontrollerv1.MinVersionHeader, "x").status).To(Equal(http.StatusBadRequest))

		Expect(eu.do("PATCH", apt+"?update_mask=version", `{"version": "2"}`).status).To(Equal(http.StatusOK))
		fresh, _ := reads.last()
		Expect(fresh).To(BeTrue())
	})
})
