package fleet

import (
	"errors"
	"fmt"
	"testing"

	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/nodemanager"
	"github.com/dbcontroller/db-controller/registry"
)

// TestRunEndsWithANodeThatDoesNotStop shows that the process ends then, whatever its other Deployments do (O3).
func TestRunEndsWithANodeThatDoesNotStop(t *testing.T) {
	g := NewWithT(t)
	f := New(Config{Region: "eu", Registry: registry.New()})
	ended := make(chan error, 1)
	go func() { ended <- f.Run(t.Context()) }()
	for range 2 { // the second one finds the first
		f.fatal(fmt.Errorf("nodes of eu: %w", nodemanager.ErrNotStopped))
	}
	var err error
	g.Eventually(ended).Should(Receive(&err))
	g.Expect(errors.Is(err, nodemanager.ErrNotStopped)).To(BeTrue())
}
