package postgres_test

import (
	"os"
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/postgres"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

func TestPostgres(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "store/postgres")
}

// open returns a store in a database of its own.
func open(region string) *postgres.Store {
	return openDSN(pgtest.Database(GinkgoTB()), region)
}

func openDSN(dsn, region string) *postgres.Store {
	GinkgoHelper()
	s, err := tryOpen(dsn, region)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(s.Close)
	return s
}

func tryOpen(dsn, region string) (*postgres.Store, error) {
	return postgres.Open(GinkgoTB().Context(), postgres.Config{DSN: dsn, Service: "library.example.com", Region: region, Version: "v1"})
}

func save(name, body string) store.Write {
	return store.Write{Op: store.Save, Name: name, Type: "Book", Body: []byte(body)}
}

func apply(s *postgres.Store, w store.Write) store.Result {
	GinkgoHelper()
	r, err := store.Apply(GinkgoTB().Context(), s, w)
	Expect(err).NotTo(HaveOccurred())
	return r
}

func haveCode(c store.Code) OmegaMatcher { return WithTransform(store.CodeOf, Equal(c)) }

func serverConfig() pgserver.Config { return pgserver.Config{} }
