package apiserver

import (
	"net/http"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/constraint"
)

const apt = "/sections/admin/packages/apt"

var _ = Describe("REST", func() {
	var w *world
	var eu, us rest
	BeforeEach(func() {
		w = newWorld(false, func(c *Config) { c.MaxMessageBytes, c.Planner = 1<<20, planned{new(constraint.Plan), nil} }, "eu", "us")
		eu, us = w.rest("eu"), w.rest("us")
	})

	It("creates, reads, changes and deletes a resource", func() {
		// 1e2 and the long number would not survive a float64.
		a := eu.do("POST", "/sections/admin/packages?id=apt", `{"version": "2.6", "size": 12345678901234567890.123, "kind": "tool", "metadata": {"labels": {"team": "infra"}}}`)
		Expect(a.status).To(Equal(http.StatusOK), a.text)
		Expect(a.text).To(ContainSubstring(`12345678901234567890.123`))
		r := a.json()
		Expect(r).To(HaveKeyWithValue("name", "sections/admin/packages/apt"))
		Expect(r).To(HaveKeyWithValue("version", "2.6"))
		Expect(r["metadata"]).To(SatisfyAll(
			HaveKeyWithValue("generation", "1"), HaveKeyWithValue("resourceVersion", "1"), HaveKeyWithValue("state", "ACTIVE"), HaveKey("uuid"),
			HaveKey("createTime"), HaveKeyWithValue("labels", HaveKeyWithValue("team", "infra")),
			HaveKeyWithValue("syncing", SatisfyAll(HaveKeyWithValue("owningRegion", "eu"), HaveKeyWithValue("regions", ConsistOf("eu", "us")))),
		))
		Expect(a.header.Get("ETag")).To(Equal(`"` + r["etag"].(string) + `"`))

		Expect(eu.do("GET", apt, "").text).To(MatchJSON(a.text))
		Expect(eu.do("POST", "/sections/admin/packages?id=apt", `{"version": "2.6"}`).status).To(Equal(http.StatusConflict))

		By("a masked update, guarded by an etag")
		b := eu.do("PATCH", apt+"?updateMask=version", `{"version": "2.7", "kind": "ignored"}`, "If-Match", a.header.Get("ETag"))
		Expect(b.status).To(Equal(http.StatusOK), b.text)
		Expect(b.json()).To(SatisfyAll(HaveKeyWithValue("version", "2.7"), HaveKeyWithValue("kind", "tool")))
		Expect(b.text).To(ContainSubstring(`12345678901234567890.123`))
		stale := eu.do("PATCH", apt, `{"version": "3"}`, "If-Match", a.header.Get("ETag"))
		Expect(stale.status).To(Equal(http.StatusConflict))
		Expect(stale.json()["error"]).To(SatisfyAll(HaveKeyWithValue("status", "ABORTED"), HaveKeyWithValue("code", BeNumerically("==", 409))))
		Expect(eu.do("DELETE", apt+"?etag="+r["etag"].(string), "").status).To(Equal(http.StatusConflict))

		By("the same again changes nothing")
		Expect(eu.do("PATCH", apt+"?update_mask=version", `{"version": "2.7"}`).text).To(MatchJSON(b.text))

		By("validate_only does nothing")
		c := eu.do("PATCH", apt+"?update_mask=kind&validate_only=true", `{"kind": "new"}`)
		Expect(c.json()).To(SatisfyAll(HaveKeyWithValue("kind", "new"), HaveKeyWithValue("version", "2.7")))
		Expect(eu.do("DELETE", apt+"?validateOnly=true", "").status).To(Equal(http.StatusOK))
		Expect(eu.do("POST", "/sections/admin/packages?id=dpkg&validate_only=true", `{"version": "1"}`).status).To(Equal(http.StatusOK))
		Expect(eu.do("POST", "/sections/admin/packages?id=apt&validate_only=true", `{"version": "1"}`).status).To(Equal(http.StatusConflict))
		Expect(eu.do("GET", "/sections/admin/packages/dpkg", "").status).To(Equal(http.StatusNotFound))
		Expect(eu.do("GET", apt, "").text).To(MatchJSON(b.text))

		By("deletion")
		Expect(eu.do("DELETE", apt, "").text).To(Equal("{}"))
		gone := eu.do("GET", apt, "")
		Expect(gone.status).To(Equal(http.StatusNotFound))
		Expect(gone.json()["error"]).To(HaveKeyWithValue("details", ContainElement(SatisfyAll(
			HaveKeyWithValue("@type", "type.googleapis.com/google.rpc.ErrorInfo"), HaveKeyWithValue("reason", "RESOURCE_NOT_FOUND"),
			HaveKeyWithValue("domain", "dbcontroller.io"), HaveKeyWithValue("metadata", HaveKeyWithValue("name", "sections/admin/packages/apt"))))))
		Expect(eu.do("DELETE", apt, "").status).To(Equal(http.StatusNotFound))
		Expect(eu.do("DELETE", apt+"?allow_missing=true", "").status).To(Equal(http.StatusOK))
		Expect(eu.do("PATCH", apt, `{"version": "1"}`).status).To(Equal(http.StatusNotFound))
		Expect(eu.do("PATCH", apt+"?allowMissing=true&updateMask=version", `{"version": "1"}`).status).To(Equal(http.StatusOK))
	})

	It("lists in pages, with filter and order, also over all parents", func() {
		for _, name := range []string{"admin/packages/apt", "admin/packages/dpkg", "libs/packages/zlib", "libs/packages/curl"} {
			a := eu.do("PATCH", "/sections/"+name+"?allow_missing=true", `{"version": "1", "kind": "`+name[:4]+`"}`)
			Expect(a.status).To(Equal(http.StatusOK), a.text)
		}
		names := func(a answer) (out []string) {
			GinkgoHelper()
			Expect(a.status).To(Equal(http.StatusOK), a.text)
			for _, r := range a.json()["resources"].([]any) {
				name := r.(map[string]any)["name"].(string)
				out = append(out, name[strings.LastIndex(name, "/")+1:])
			}
			return out
		}
		Expect(names(eu.do("GET", "/sections/admin/packages", ""))).To(Equal([]string{"apt", "dpkg"}))
		all := "/sections/-/packages?pageSize=3"
		first := eu.do("GET", all, "")
		Expect(names(first)).To(Equal([]string{"apt", "dpkg", "curl"}))
		Expect(names(eu.do("GET", all+"&page_token="+first.json()["nextPageToken"].(string), ""))).To(Equal([]string{"zlib"}))
		Expect(names(eu.do("GET", "/sections/-/packages?order_by=name%20desc&filter=kind%3D%22libs%22", ""))).To(Equal([]string{"zlib", "curl"}))
		Expect(eu.do("GET", "/sections/admin/packages?page_token="+first.json()["nextPageToken"].(string), "").violations()).To(Equal([]string{"page_token"}))
		Expect(names(eu.do("GET", ":batchGet?names=sections/libs/packages/curl&names=sections/admin/packages/apt", ""))).To(Equal([]string{"curl", "apt"}))
		Expect(eu.do("GET", ":batchGet?names=sections/libs/packages/none", "").status).To(Equal(http.StatusNotFound))
	})

	It("writes a batch whole or not at all", func() {
		a := eu.do("POST", ":batchWrite", `{"writes": [
			{"create": {"resource": {"name": "sections/admin/packages/apt", "version": "1"}}},
			{"update": {"resource": {"name": "sections/admin/packages/dpkg", "version": "1"}, "updateMask": "version", "allowMissing": true}},
			{"delete": {"name": "sections/admin/packages/old", "allow_missing": true}}]}`)
		Expect(a.status).To(Equal(http.StatusOK), a.text)
		Expect(a.json()["resources"]).To(HaveLen(3))
		b := eu.do("POST", ":batchWrite", `{"writes": [{"delete": {"name": "sections/admin/packages/apt"}}, {"create": {"resource": {"name": "sections/admin/packages/dpkg", "version": "1"}}}]}`)
		Expect(b.status).To(Equal(http.StatusConflict), b.text)
		Expect(eu.do("GET", apt, "").status).To(Equal(http.StatusOK))

		twice := eu.do("POST", ":batchWrite", `{"writes": [{"delete": {"name": "sections/a"}}, {"delete": {"name": "sections/a"}}]}`)
		Expect(twice.violations()).To(Equal([]string{"writes[1]"}))
		mixed := eu.do("POST", ":batchWrite", `{"writes": [{"delete": {"name": "sections/a"}}, {"delete": {"name": "regions/us/mirrors/m"}}]}`)
		Expect(mixed.text).To(SatisfyAll(ContainSubstring("FAILED_PRECONDITION"), ContainSubstring("sections/a"), ContainSubstring("regions/us/mirrors/m")))
		deep := eu.do("POST", ":batchWrite", `{"writes": [{"create": {"resource": {"name": "sections/admin/packages/x", "version": 1}}}]}`)
		Expect(deep.violations()).To(Equal([]string{"writes[0].version"}))
	})

	It("runs a write in the region that owns the name", func() {
		a := us.do("POST", "/sections/admin/packages?id=apt", `{"version": "2.6"}`)
		Expect(a.status).To(Equal(http.StatusOK), a.text)
		Expect(us.do("GET", apt, "").status).To(Equal(http.StatusNotFound), "nothing copies in this test")
		Expect(eu.do("GET", apt, "").text).To(MatchJSON(a.text))
		Expect(us.do("POST", "/regions/us/mirrors?id=m", `{}`).json()["metadata"]).To(HaveKeyWithValue("syncing", HaveKeyWithValue("owningRegion", "us")))
		Expect(us.do("PATCH", apt+"?update_mask=version", `{"version": "3"}`).json()).To(HaveKeyWithValue("version", "3"))

		By("errors of the owner are the answer, details too")
		Expect(us.do("POST", "/sections/admin/packages?id=apt", `{"version": "2.6"}`).text).To(MatchJSON(eu.do("POST", "/sections/admin/packages?id=apt", `{"version": "2.6"}`).text))
		Expect(us.do("PATCH", apt+"?update_mask=version", `{}`).violations()).To(Equal([]string{"version"}))
		Expect(us.do("DELETE", apt, "").text).To(Equal("{}"))

		By("an owner that cannot be reached")
		w.regions["eu"].stop()
		down := us.do("DELETE", apt, "")
		Expect(down.status).To(Equal(http.StatusServiceUnavailable))
		Expect(down.text).To(SatisfyAll(ContainSubstring("OWNER_UNREACHABLE"), Not(ContainSubstring("127.0.0.1"))))

		By("an owner that is disabled, or not there")
		w.deployments[0] = w.deployments[0].DeepCopy()
		w.deployments[0].Spec.Disabled = true
		w.publish()
		Expect(us.do("DELETE", apt, "").text).To(SatisfyAll(ContainSubstring("WRONG_REGION"), ContainSubstring("disabled")))
		w.deployments = w.deployments[1:]
		w.publish()
		Expect(us.do("DELETE", apt, "").text).To(SatisfyAll(ContainSubstring("FAILED_PRECONDITION"), ContainSubstring("no Deployment")))
	})

	It("talks only to the Deployment that is meant", func() {
		By("eu's endpoint answers with the certificate of us")
		w.deployments[0] = w.deployments[0].DeepCopy()
		w.deployments[0].Spec.Endpoint = w.regions["us"].endpoint
		w.publish()
		Expect(us.do("DELETE", apt, "").status).To(Equal(http.StatusServiceUnavailable))
	})

})

var _ = Describe("REST input", Ordered, func() {
	var eu rest
	BeforeAll(func() {
		eu = newWorld(false, func(c *Config) { c.MaxMessageBytes = 1 << 20 }, "eu").rest("eu")
	})

	DescribeTable("refuses bad input and names the field", func(method, path, body string, fields ...string) {
		a := eu.do(method, path, body)
		Expect(a.status).To(Equal(http.StatusBadRequest), a.text)
		Expect(a.json()["error"]).To(HaveKeyWithValue("status", "INVALID_ARGUMENT"))
		Expect(a.violations()).To(Equal(fields), a.text)
	},
		Entry("unknown type", "GET", "/things/x", "", "name"),
		Entry("malformed name", "GET", "/sections/a%20b", "", "name"),
		Entry("name that is not UTF-8", "GET", "/sections/%ff", "", "name"),
		Entry("unknown collection", "GET", "/things", "", "collection"),
		Entry("misspelt parameter", "GET", "/sections?filtre=x", "", "filtre"),
		Entry("bad filter", "GET", "/sections?filter=((", "", "filter"),
		Entry("bad order", "GET", "/sections?order_by=,", "", "order_by"),
		Entry("bad page token", "GET", "/sections?page_token=x", "", "page_token"),
		Entry("negative page size", "GET", "/sections?page_size=-1", "", "page_size"),
		Entry("page size that is no number", "GET", "/sections?page_size=many", "", "page_size"),
		Entry("body that is no JSON", "POST", "/sections?id=a", "{", "body"),
		Entry("body that is no object", "POST", "/sections?id=a", "[]", "body"),
		Entry("body that is followed by another", "POST", "/sections?id=a", "{} {}", "body"),
		Entry("body that is not UTF-8", "POST", "/sections?id=a", "{\"x\": \"\xff\"}", "body"),
		Entry("body that is too deep", "POST", "/sections?id=a", `{"x":`+strings.Repeat("[", 1000)+strings.Repeat("]", 1000)+"}", "body"),
		Entry("message over the limit", "POST", "/sections?id=a", `{"x":"`+strings.Repeat("x", 1<<20)+`"}`, "body"),
		Entry("body over the limit of its type", "POST", "/sections?id=a", `{"x":"`+strings.Repeat("x", 300<<10)+`"}`, "body"),
		Entry("NUL in a body", "POST", "/sections?id=a", `{"x": "\u0000"}`, "body"),
		Entry("body against the schema", "POST", "/sections/a/packages?id=b", `{"version": 1, "spec": {"depth": 11}, "colour": "red"}`, "colour", "spec.depth", "version"),
		Entry("etag in the body of a create", "POST", "/sections?id=a", `{"etag": "1.1"}`, "resource.etag"),
		Entry("unknown metadata", "POST", "/sections?id=a", `{"metadata": {"colour": "red"}}`, "metadata"),
		Entry("bad metadata", "POST", "/sections?id=a", `{"metadata": {"labels": {"a b": "x"}, "tags": ["t", "t"]}}`, `metadata.labels["a b"]`, "metadata.tags[1]"),
		Entry("NUL in a label", "POST", "/sections?id=a", `{"metadata": {"labels": {"a": "\u0000"}}}`, `metadata.labels["a"]`),
		Entry("name twice", "POST", "/sections?id=a", `{"name": "sections/a", "name": "sections/b"}`, "name"),
		Entry("create without an id", "POST", "/sections", `{}`, "id"),
		Entry("id that is none", "POST", "/sections?id=a/b", `{}`, "resource.name"),
		Entry("two names", "PATCH", "/sections/a", `{"name": "sections/b"}`, "name"),
		Entry("bad etag", "PATCH", "/sections/a", `{"etag": "x"}`, "etag"),
		Entry("bad mask", "PATCH", "/sections/a?update_mask=a..b", `{}`, "update_mask.paths[0]"),
		Entry("bad flag", "DELETE", "/sections/a?allow_missing=perhaps", "", "allow_missing"),
		Entry("batch without writes", "POST", ":batchWrite", "{}", "writes"),
		Entry("batch with another field", "POST", ":batchWrite", `{"write": []}`, "write"),
		Entry("batch with another operation", "POST", ":batchWrite", `{"writes": [{"move": {}}]}`, "writes[0]"),
		Entry("batch with a bad write", "POST", ":batchWrite", `{"writes": [{"delete": {"name": "x"}}]}`, "writes[0].name"),
	)

	It("answers what it has not with the status that fits", func() {
		Expect(eu.do("PUT", apt, "{}").status).To(Equal(http.StatusNotImplemented))
		Expect(rest{eu.client, strings.TrimSuffix(eu.base, "/v1")}.do("GET", "/v2/sections/a", "").status).To(Equal(http.StatusNotFound))
		Expect(eu.do("POST", "/sections?id=a", "{}", "Content-Type", "text/plain").violations()).To(Equal([]string{"Content-Type"}))
	})
})
