package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
)

// exitRefused is the exit code of plan-delete for a deletion that would be refused.
const exitRefused = 3

func newPlanDelete() *cobra.Command {
	var s server
	cmd := &cobra.Command{
		Use:   "plan-delete NAME",
		Short: "Show what a deletion would take along, and what forbids it; nothing is written",
		Long: `Plan-delete asks all Deployments that refer to a resource, and those that refer to what would go with it, and shows what its deletion would
do: what would be deleted, which fields would be cleared, through which reference, at once or afterwards; what forbids it; and who could not be
asked. It writes nothing, anywhere. The deletion itself looks again.

Exit codes: 0 if the deletion would be accepted as far as could be asked, 3 if it would be refused, 1 after an error, 2 after a wrong call.`,
		Example: `  db-controller plan-delete sections/admin
  db-controller plan-delete --server https://us.packages.example.com:8443 --cert me.crt --key me.key --cacert ca.crt sections/admin
  db-controller plan-delete -o json sections/admin | jq '[.deployments[].deletes] | add'`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := s.client()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), askTimeout)
			defer cancel()
			res, err := c.Delete(ctx, connect.NewRequest(&v1.DeleteRequest{Name: args[0], ValidateOnly: true}))
			if err != nil {
				return s.failed(err)
			}
			plan := res.Msg.GetPlan()
			if plan == nil {
				return fmt.Errorf("%s is too old to plan deletions: update it", s.url)
			}
			if s.output == "json" {
				err = printJSON(cmd.OutOrStdout(), plan)
			} else {
				err = writePlan(cmd.OutOrStdout(), args[0], plan, s.deletion(args[0]))
			}
			if err == nil && plan.GetRefused() {
				return exitError{fmt.Errorf("the deletion of %s would be refused", args[0]), exitRefused}
			}
			return err
		},
	}
	s.flags(cmd)
	return cmd
}

// deletion is the command that deletes a resource.
func (s *server) deletion(name string) string {
	body, err := json.Marshal(map[string]string{"name": name})
	if err != nil {
		panic(err) // a string always encodes
	}
	words := []string{"curl"}
	for _, f := range [][2]string{{"--cert", s.cert}, {"--key", s.key}, {"--cacert", s.cacert}} {
		if f[1] != "" {
			words = append(words, f[0], quote(f[1]))
		}
	}
	words = append(words, "-H", quote("Content-Type: application/json"), "-d", quote(string(body)), quote(strings.TrimSuffix(s.url, "/")+dbcontrollerv1connect.ResourcesDeleteProcedure))
	return strings.Join(words, " ")
}

// quote makes one word of a shell.
func quote(s string) string {
	if strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_./:=+~@%") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

func writePlan(w io.Writer, name string, plan *v1.DeletionPlan, deletion string) error {
	var p page
	var deletes, unsets, later int32
	for _, d := range plan.GetDeployments() {
		deletes, unsets, later = deletes+d.GetDeletes(), unsets+d.GetUnsets(), later+d.GetAsynchronous()
		writeTree(&p.Buffer, d)
		p.WriteByte('\n')
	}
	p.block("Deletes", []string{fmt.Sprint(deletes)})
	p.block("Clears", []string{fmt.Sprint(unsets)})
	if later > 0 {
		p.block("Afterwards", []string{fmt.Sprintf("%d of both: not in the transaction of the deletion", later)})
	}
	if plan.GetTruncated() {
		p.block("Cut short", []string{"there is more than is shown"})
	}
	if len(plan.GetOwnees()) > 0 {
		p.block("Ownees", []string{"not counted: resources in " + strings.Join(plan.GetOwnees(), ", ") + " lose an owner, and go if it was the last"})
	}
	var refuses, holdsUp, unasked [][]string
	if plan.GetTooLarge() {
		refuses = append(refuses, []string{"it would take more along in one transaction than a deletion may"})
	}
	for _, b := range plan.GetBlockers() {
		if b.GetAsynchronous() {
			holdsUp = append(holdsUp, []string{b.GetTarget(), because(b)})
		} else {
			refuses = append(refuses, []string{b.GetTarget(), because(b)})
		}
	}
	for _, u := range plan.GetUnasked() {
		unasked = append(unasked, []string{u.GetLocation(), fmt.Sprintf("about %d resources", u.GetNames()), u.GetError()})
	}
	p.block("Refused by", refuses...)
	p.block("Held up by", holdsUp...)
	p.block("Not asked", unasked...)
	p.block("Next", []string{nextStep(name, plan, deletion)})
	_, err := w.Write(p.Bytes())
	return err
}

// because says why a blocker blocks.
func because(b *v1.PlannedBlocker) string {
	referrer := b.GetReferrer()
	if referrer == "" {
		referrer = "a resource"
	}
	if b.GetField() != "" {
		referrer += " (" + b.GetField() + ")"
	}
	switch {
	case b.GetBlockDeletion():
		return "its service holds up the deletion"
	case b.GetTentativeUntil() != nil:
		return fmt.Sprintf("%s in %s is being written and may refer to it%s", referrer, b.GetLocation(), since(", until ", b.GetTentativeUntil()))
	}
	return fmt.Sprintf("%s in %s refers to it", referrer, b.GetLocation())
}

func nextStep(name string, plan *v1.DeletionPlan, deletion string) string {
	tentative := false
	for _, b := range plan.GetBlockers() {
		if b.GetAsynchronous() {
			continue
		}
		if tentative = b.GetTentativeUntil() != nil; !tentative {
			break
		}
	}
	switch {
	case plan.GetTooLarge():
		return "delete some of the above first, a few hundred at a time"
	case plan.GetRefused() && tentative:
		return "wait until those writes have ended, and plan again"
	case plan.GetRefused():
		return "delete what refuses it, or remove the references from it, and plan again"
	case len(plan.GetUnasked()) > 0:
		return "let those who were not asked be reached, and plan again; if they hold references that forbid it, the deletion is refused until then"
	case len(plan.GetDeployments()) == 0:
		return "nothing: " + name + " is being deleted already; see db-controller why " + name
	}
	return deletion
}

// writeTree prints what would happen in one Deployment: below each resource what follows from its deletion there.
func writeTree(p *bytes.Buffer, d *v1.PlannedDeployment) {
	fmt.Fprintf(p, "%s\n", d.GetLocation())
	below := map[string][]*v1.PlannedChange{}
	listed := map[string]bool{}
	for _, c := range d.GetChanges() {
		listed[c.GetName()] = listed[c.GetName()] || !c.GetUnset()
	}
	var roots []*v1.PlannedChange
	for _, c := range d.GetChanges() {
		if c.GetTarget() == c.GetName() || !listed[c.GetTarget()] {
			roots = append(roots, c)
		} else {
			below[c.GetTarget()] = append(below[c.GetTarget()], c)
		}
	}
	var branch func(indent string, changes []*v1.PlannedChange, top bool)
	branch = func(indent string, changes []*v1.PlannedChange, top bool) {
		for i, c := range changes {
			fork, down := "├── ", "│   "
			if i == len(changes)-1 {
				fork, down = "└── ", "    "
			}
			fmt.Fprintf(p, "%s%s%s\n", indent, fork, changeText(c, top))
			if !c.GetUnset() {
				next := below[c.GetName()]
				delete(below, c.GetName()) // each is printed once, whatever the answer says
				branch(indent+down, next, false)
			}
		}
	}
	branch("", roots, true)
}

// changeText is one line of the tree. What a reference at the top points to is not in the tree.
func changeText(c *v1.PlannedChange, top bool) string {
	text := fmt.Sprintf("%s (%s)", c.GetName(), c.GetType())
	through := c.GetField()
	if through == "name" {
		through = "its parent"
	}
	switch {
	case c.GetUnset():
		text = "clears " + c.GetField() + " of " + text
		if top {
			text += ", which is " + c.GetTarget()
		}
	case through != "" && top:
		text += ", through " + through + ": " + c.GetTarget()
	case through != "":
		text += ", through " + through
	}
	if c.GetAsynchronous() {
		text += ", afterwards"
	}
	return text
}
