package deployment

import (
	"reflect"
	"testing"
	"time"

	"github.com/dbcontroller/db-controller/constraint"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
)

func TestMergeReferences(t *testing.T) {
	us, ap := store.Location{Service: "b.example.com", Region: "us"}, store.Location{Service: "b.example.com", Region: "ap"}
	node := func(from, to int32, age time.Duration, h *constraint.Health) aged {
		return aged{nodeReport{Shards: descriptor.ShardRange{From: from, To: to}, References: h}, age}
	}
	for name, c := range map[string]struct {
		all  []aged
		want *constraint.Health
	}{
		"nobody reports":      {nil, nil},
		"a shard without one": {[]aged{node(0, 63, 0, &constraint.Health{})}, nil},
		"one that is idle":    {[]aged{node(0, 64, time.Hour, &constraint.Health{})}, &constraint.Health{}},
		"two, one of which reported some time ago": {[]aged{
			node(0, 32, time.Minute, &constraint.Health{Dangling: 1, Cascading: 2, Oldest: time.Minute, OldestKind: "drain", Unreachable: []store.Location{us}}),
			node(32, 64, 0, &constraint.Health{Refused: 3, Oldest: 90 * time.Second, OldestKind: "confirm", Unreachable: []store.Location{ap, us}}),
		}, &constraint.Health{Dangling: 1, Cascading: 2, Refused: 3, Oldest: 2 * time.Minute, OldestKind: "drain", Unreachable: []store.Location{ap, us}}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := mergeReferences(64, c.all); !reflect.DeepEqual(got, c.want) {
				t.Errorf("%+v, want %+v", got, c.want)
			}
		})
	}
}
