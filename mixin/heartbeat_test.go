package mixin_test

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	. "github.com/onsi/gomega"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// everySecond is a feed in which nothing happens.
type everySecond struct{}

func (everySecond) Follow(ctx context.Context, _ feed.Interest, step func(context.Context) (bool, error)) error {
	for {
		if _, err := step(ctx); err != nil {
			return err
		}
		time.Sleep(time.Second)
	}
}

type quietCore struct{ mixin.Core }

func (quietCore) ReadTasks(context.Context, feed.Cursor, feed.Range, func(store.Task) error) (feed.Read, error) {
	return feed.Read{Cursor: feed.Cursor{Epoch: 3, Snapshot: feed.Snapshot{Xmin: 9, Xmax: 9}}}, nil
}

// Who follows deletions hears at once where the stream begins, and then now and then that nothing was missed.
func TestQuietStream(t *testing.T) {
	RegisterTestingT(t)
	topo := topology(nil)
	synctest.Test(t, func(t *testing.T) {
		type nothing struct{ store.Store }
		s, err := mixin.NewServer(mixin.Config{
			Service: secretsService, Region: "eu", Version: "v2", Topology: topo, Core: quietCore{}, Store: nothing{},
			Owners: policies{}, Policies: policies{}, Changes: everySecond{}, Logger: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			t.Fatal(err)
		}
		enough := errors.New("enough")
		start := time.Now()
		var at []time.Duration
		err = s.WatchImportedServiceDeletions(t.Context(), &v1.WatchImportedServiceDeletionsRequest{Call: call(appsEU, secretsEU, "v1")}, func(res *v1.WatchImportedServiceDeletionsResponse) error {
			if res.GetResumeToken() == "" || res.GetEpoch() != 3 || len(res.GetDeleting()) > 0 {
				t.Errorf("got %v", res)
			}
			if at = append(at, time.Since(start)); len(at) == 3 {
				return enough
			}
			return nil
		})
		if !errors.Is(err, enough) {
			t.Error(err)
		}
		if at[0] != 0 || at[1] != 5*time.Second || at[2] != 10*time.Second {
			t.Errorf("told at %v", at)
		}
	})
}
