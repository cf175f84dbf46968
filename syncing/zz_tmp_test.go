package syncing_test

import (
	"os"
	"fmt"
	"time"
	"runtime/pprof"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/syncing"
)

var _ = Describe("tmpbench", func() {
	It("copies", func() {
		if os.Getenv("TMPBENCH") == "" { Skip("") }
		w := newWorld("eu", "us")
		w.declare("eu", "us")
		eu, us := w.regions["eu"], w.regions["us"]
		eu.sql(`INSERT INTO v1.resources (name,type,uuid,epoch,resource_version,generation,shard,owning_region,regions,create_time,update_time,meta,body)
			SELECT 'shelves/a/books/'||i,'Book',gen_random_uuid(),1,1,1,i%64,'eu','{*}',now(),now(),'{}',jsonb_build_object('title',repeat(md5(i::text),28),'n',i) FROM generate_series(1,300000) i`, "ANALYZE v1.resources")
		f, _ := os.Create("/tmp/syncov/cpu.prof")
		pprof.StartCPUProfile(f)
		t := time.Now()
		node, _ := us.sync(func(c *syncing.Config) {})
		live(node, "eu")
		d := time.Since(t)
		pprof.StopCPUProfile()
		fmt.Println("INITIAL", d, 300000/d.Seconds(), "rows/s")
		converge(us, eu)
		t = time.Now()
		eu.sql("UPDATE v1.resources SET resource_version = 2, change = pg_current_xact_id(), update_time = now()")
		Eventually(func() int64 { return status(node, "eu").RowsApplied }, "120s", "20ms").Should(BeNumerically("==", 600000))
		fmt.Println("CATCHUP incl. update", time.Since(t))
		t = time.Now()
		Eventually(func() bool { s := status(node, "eu"); return s.State == syncing.Live && freshness(node, "eu") < 2*time.Second }, "20s", "20ms").Should(BeTrue())
		fmt.Printf("%+v\n", status(node, "eu"))
	})
})
