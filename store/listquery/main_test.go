package listquery_test

import (
	"os"
	"testing"

	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }
