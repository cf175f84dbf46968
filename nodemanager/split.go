package nodemanager

import "github.com/dbcontroller/db-controller/descriptor"

// Split cuts a ring into n contiguous ranges, in order, whose sizes differ by one at most. With more nodes than shards the last ranges
// are empty.
func Split(ring, n int) []descriptor.ShardRange {
	ranges := make([]descriptor.ShardRange, max(0, n))
	size, rest, from := 0, 0, 0
	if n > 0 {
		size, rest = ring/n, ring%n
	}
	for i := range ranges {
		to := from + size
		if i < rest {
			to++
		}
		ranges[i] = descriptor.ShardRange{From: int32(from), To: int32(to)}
		from = to
	}
	return ranges
}
