package main

import (
	"strings"
	"testing"

	. "github.com/onsi/gomega"
)

func TestStatusSaysWhichPolicyIsHeldBack(t *testing.T) {
	g := NewWithT(t)
	var out strings.Builder
	writeStatus(&out, statusz{Deployments: []deploymentStatus{
		{Service: "notes.example.com", Region: "eu", Version: "v1", PolicyHeld: []string{"region us still owns 2 resources"}},
		{Service: "notes.example.com", Region: "us", Version: "v1"},
	}})
	g.Expect(out.String()).To(ContainSubstring("\nnotes.example.com in eu follows the former multiRegionPolicy of the ServiceDescriptor: region us still owns 2 resources\n"))
	g.Expect(strings.Count(out.String(), "former")).To(Equal(1))
}
