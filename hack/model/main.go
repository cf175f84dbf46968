// Model searches the protocol of references between Deployments exhaustively, and checks that each planted bug is found.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/dbcontroller/db-controller/constraint/model"
)

func main() {
	verbose := flag.Bool("traces", false, "print the shortest trace of each planted bug")
	flag.Usage = func() {
		fmt.Fprint(os.Stderr, "Model searches the protocol of references between Deployments exhaustively: no world may violate it, and each planted bug must be found.\n\n"+
			"  go run ./hack/model 2>/dev/null    # one line of JSON; exit 1 unless violations is 0 and found equals planted\n\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	if !run(*verbose) {
		os.Exit(1)
	}
}

// report is the line on standard output.
type report struct {
	Worlds      int `json:"worlds"`
	States      int `json:"states"`
	Transitions int `json:"transitions"`
	Violations  int `json:"violations"`
	Planted     int `json:"planted"`
	Found       int `json:"found"`
}

// run searches two worlds or mutants at a time, and reports whether all is as it must be.
func run(traces bool) bool {
	var (
		mu     sync.Mutex
		wg     sync.WaitGroup
		sum    report
		worlds = map[string]model.World{}
		turn   = make(chan struct{}, 2)
		start  = time.Now()
	)
	search := func(w model.World, bug model.Bug, done func(model.Result, time.Duration)) {
		turn <- struct{}{}
		wg.Go(func() {
			began := time.Now()
			r := model.Search(w, bug)
			<-turn
			mu.Lock()
			defer mu.Unlock()
			done(r, time.Since(began))
		})
	}
	for _, w := range model.Worlds() {
		worlds[w.Name] = w
		search(w, 0, func(r model.Result, took time.Duration) {
			sum.Worlds++
			sum.States += r.States
			sum.Transitions += r.Transitions
			fmt.Fprintf(os.Stderr, "%-24s %8d states %9d transitions %6.1fs  %s\n", w.Name, r.States, r.Transitions, took.Seconds(), w.About)
			if r.Violation != "" {
				sum.Violations++
				tell(r)
			}
		})
	}
	for _, m := range model.Mutants() {
		search(worlds[m.World], m.Bug, func(r model.Result, took time.Duration) {
			sum.Planted++
			if r.Violation == "" {
				fmt.Fprintf(os.Stderr, "%-24s NOT FOUND in %d states: %s\n", m.World, r.States, m.Name)
				return
			}
			sum.Found++
			fmt.Fprintf(os.Stderr, "%-24s %8d states, found in %2d steps %6.1fs  %s\n", m.World, r.States, len(r.Trace), took.Seconds(), m.Name)
			if traces {
				tell(r)
			}
		})
	}
	wg.Wait()
	fmt.Fprintf(os.Stderr, "took %.1fs\n", time.Since(start).Seconds())
	line, err := json.Marshal(sum)
	if err != nil {
		panic(err) // six integers
	}
	fmt.Println(string(line))
	return sum.Violations == 0 && sum.Found == sum.Planted
}

func tell(r model.Result) {
	fmt.Fprintf(os.Stderr, "  violated: %s\n", r.Violation)
	for i, step := range r.Trace {
		fmt.Fprintf(os.Stderr, "  %3d. %s\n", i+1, step)
	}
}
