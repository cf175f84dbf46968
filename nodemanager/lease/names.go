package lease

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
)

// What Leases are found and read by.
const (
	labelRing = "meta.dbcontroller.io/ring"
	labelKind = "meta.dbcontroller.io/node-kind"
	labelRole = "meta.dbcontroller.io/lease" // member, plan or leader

	annotationReport = "meta.dbcontroller.io/report"
	annotationPlan   = "meta.dbcontroller.io/plan"

	roleMember, rolePlan, roleLeader = "member", "plan", "leader"
)

// maxLabel is the longest value of a label, maxName the longest name of a Lease.
const (
	maxLabel = 63
	maxName  = 253
)

// Prefix returns the names' common part for a ring: an installation, a service and a region of it. Two rings never have the same: where
// the parts do not fit in a label, or could be read in two ways, a hash of them is part of it.
func Prefix(release, service, region string) string {
	parts := []string{release, service, region}
	plain := strings.Join(parts, ".")
	ambiguous := strings.Contains(release, ".") || strings.Contains(region, ".")
	return fit(plain, strings.Join(parts, "\x00"), maxLabel, ambiguous)
}

// fit returns s as a DNS-1123 name of that length at most. If it is not one, or always, a hash of what it stands for is in it.
func fit(s, of string, length int, always bool) string {
	clean := strings.Trim(strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '-', r == '.':
			return r
		}
		return '-'
	}, strings.ToLower(s)), "-.")
	if clean == s && len(s) <= length && !always && !strings.Contains(s, "..") && !strings.Contains(s, ".-") && !strings.Contains(s, "-.") {
		return s
	}
	sum := sha256.Sum256([]byte(of))
	hash := hex.EncodeToString(sum[:5])
	for _, twice := range []string{"..", ".-", "-."} {
		clean = strings.ReplaceAll(clean, twice, "--")
	}
	if keep := length - len(hash) - 1; len(clean) > keep {
		clean = strings.TrimRight(clean[:keep], "-.")
	}
	if clean == "" {
		return hash
	}
	return clean + "-" + hash
}

func memberName(prefix, kind, replica string) string {
	head := prefix + "-" + kind + "-"
	return head + fit(replica, replica, maxName-len(head), false)
}

func planName(prefix, kind string) string { return prefix + "-plan-" + kind }

func leaderName(prefix string) string { return prefix + "-leader" }
