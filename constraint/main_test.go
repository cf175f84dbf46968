package constraint_test

import (
	"os"
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

// TestConstraint runs all specs of the package.
func TestConstraint(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "constraint")
}
