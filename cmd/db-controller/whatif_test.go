package main

import (
	"bytes"
	"strings"
	"testing"

	. "github.com/onsi/gomega"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
)

func TestPreviewAsText(t *testing.T) {
	for _, c := range []struct {
		situation string
		preview   *v1.PolicyPreview
		want      string
	}{
		{"accepted, with all rates known", &v1.PolicyPreview{
			Before: "A", After: "B", Updates: map[string]int64{"eu": 1200, "us": 3}, Seconds: 1.5,
			Moves: []*v1.PolicyMove{
				{Region: "ap", Owner: "eu", Type: "Package", Rows: 1200, Bytes: 2_000_000},
				{Region: "us", Owner: "eu", Type: "Package", Dropped: true, Rows: 1200, Bytes: 200},
			},
		}, `
Policy now    A
Would be      B
Changes       eu  1200 resources get another metadata.syncing
              us  3 resources get another metadata.syncing
Copies        ap  gains  1200 Package  of eu  about 1953 KiB
              us  drops  1200 Package  of eu  about 200 bytes
Takes         about 1.5s
`},
		{"refused, not measured, and one is away", &v1.PolicyPreview{
			Before: "A", After: "B", Updates: map[string]int64{"eu": 1}, UnknownRates: []string{"changes in eu"},
			Refusals: []string{"region us still owns 7 resources"}, Unasked: []*v1.UnaskedDeployment{{Location: "packages.example.com/ap", Error: "away"}},
		}, `
Policy now    A
Would be      B
Changes       eu  1 resources get another metadata.syncing
Copies        nothing
Takes         unknown: nothing was measured yet
Refused       region us still owns 7 resources
Not asked     packages.example.com/ap  away
`},
	} {
		t.Run(c.situation, func(t *testing.T) {
			var out bytes.Buffer
			if err := writePreview(&out, c.preview); err != nil {
				t.Fatal(err)
			}
			NewWithT(t).Expect(out.String()).To(Equal(strings.TrimPrefix(c.want, "\n")))
		})
	}
}
