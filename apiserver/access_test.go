package apiserver

import (
	"context"
	"net/http"
	"strings"

	"connectrpc.com/connect"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/internal/pki"
)

// Every method of the protocol, called by everybody there is. Whoever adds a method must say here who may call it.
var _ = Describe("Access", Ordered, func() {
	const us, ap = "us", "ap"
	callers := []struct {
		name      string
		id        pki.Identity
		forwarded string
	}{
		{"user", alice, ""},
		{"user who claims to forward", alice, us},
		{"peer", deployment(us), ""},
		{"peer that forwards", deployment(us), us},
		{"peer that forwards as another", deployment(us), ap},
		{"peer of another region than it says", deployment(ap), ""}, // the Peer message says us
		{"undeclared peer", deployment("mars"), "mars"},
		{"disabled peer", deployment("off"), "off"},
		{"ourselves", deployment("eu"), "eu"},
		{"undeclared Deployment of another service", pki.Identity{TrustDomain: domain, Service: "other.example.com", Region: us}, us},
		{"Deployment of another service", pki.Identity{TrustDomain: domain, Service: "library.example.com", Region: us}, us},
	}
	user, forwarder, peer := []string{"user"}, []string{"user", "peer that forwards"}, []string{"peer", "peer that forwards", "peer that forwards as another"}
	anyPeer := append([]string{"Deployment of another service"}, peer...)
	allowed := map[string][]string{
		"Resources/Get": user, "Resources/BatchGet": user, "Resources/List": user, "Resources/Watch": user, "Resources/Search": user, "Resources/PreviewPolicy": user,
		"Resources/Create": forwarder, "Resources/Update": forwarder, "Resources/Delete": forwarder, "Resources/BatchWrite": forwarder, "Resources/Explain": forwarder,
		"Feed/Ping": peer, "Feed/Tail": peer, "Feed/Digest": peer, "Feed/Versions": peer, "Feed/Fetch": peer, "Feed/Ranges": peer, "Feed/Hashes": peer,
		"Verification/Verify": user, "Verification/ListVerified": user, "Verification/Residency": user,
		"SchemaMixin/EstablishReferences": anyPeer, "SchemaMixin/ConfirmBlockades": anyPeer, "SchemaMixin/CheckIfResourceIsBlocked": anyPeer,
		"SchemaMixin/CheckIfResourceHasDeletionSubscriber": anyPeer, "SchemaMixin/CheckIfHasMetaOwnee": anyPeer, "SchemaMixin/ConfirmMetaOwner": anyPeer,
		"SchemaMixin/UpgradeMetaOwnerVersion": anyPeer, "SchemaMixin/RemoveMetaOwnerReference": anyPeer, "SchemaMixin/ListMetaOwnees": anyPeer,
		"SchemaMixin/WatchImportedServiceDeletions": anyPeer, "SchemaMixin/PlanDeletion": anyPeer, "SchemaMixin/MeasureHoldings": peer,
		"ResourceShadows/GetResourceShadow": user, "ResourceShadows/ListResourceShadows": user, "ResourceShadows/WatchResourceShadows": user,
	}

	var w *world
	BeforeAll(func() {
		w = newWorld(false, func(c *Config) { c.Mixin = idleMixin{} }, "eu")
		for _, name := range []string{us, ap, "off"} {
			d := w.deployments[0].DeepCopy()
			d.Name, d.Spec.Region, d.Spec.Disabled = name, name, name == "off"
			w.deployments = append(w.deployments, d)
		}
		other := w.deployments[0].DeepCopy()
		other.Name, other.Spec.Service, other.Spec.Region = "library", "library.example.com", us
		w.deployments = append(w.deployments, other)
		w.publish()
	})

	services := []protoreflect.ServiceDescriptor{}
	for _, file := range []protoreflect.FileDescriptor{
		dbcontrollerv1.File_dbcontroller_v1_resources_proto, dbcontrollerv1.File_dbcontroller_v1_feed_proto, dbcontrollerv1.File_dbcontroller_v1_mixin_proto, dbcontrollerv1.File_dbcontroller_v1_verification_proto,
	} {
		for i := range file.Services().Len() {
			services = append(services, file.Services().Get(i))
		}
	}
	for _, service := range services {
		for i := range service.Methods().Len() {
			method := service.Methods().Get(i)
			short := string(service.Name()) + "/" + string(method.Name())
			for _, caller := range callers {
				It(short+" by "+caller.name, func() {
					who, known := allowed[short]
					Expect(known).To(BeTrue(), "say in this test who may call %s", short)
					code := call(w, method, caller.id, caller.forwarded)
					if contains(who, caller.name) {
						Expect(code).NotTo(Equal(connect.CodePermissionDenied))
					} else {
						Expect(code).To(Equal(connect.CodePermissionDenied))
					}
				})
			}
		}
	}

	It("is the same for REST", func() {
		get := func(id pki.Identity, header ...string) int {
			return rest{w.client(id, "eu"), w.regions["eu"].endpoint + "/v1"}.do("GET", "/sections", "", header...).status
		}
		Expect(get(alice)).To(Equal(http.StatusOK))
		Expect(get(alice, dbcontrollerv1.ForwardedByHeader, us)).To(Equal(http.StatusForbidden))
		Expect(get(deployment(us))).To(Equal(http.StatusForbidden))
	})

	It("counts calls by method and code", func() {
		Expect(metricValue(w.regions["eu"].metrics, "dbcontroller_requests_total", "Feed/Ping", "permission_denied")).To(BeNumerically(">", 0))
		Expect(metricValue(w.regions["eu"].metrics, "dbcontroller_requests_total", "Resources/List", "ok")).To(BeNumerically(">", 0))
	})
})

func contains(list []string, s string) bool {
	return strings.Contains("\n"+strings.Join(list, "\n")+"\n", "\n"+s+"\n")
}

// call sends a message that is empty but for a Peer or a Call of us, to eu, and returns the code of the answer; 0 if there was one, or if a stream began.
func call(w *world, method protoreflect.MethodDescriptor, id pki.Identity, forwardedBy string) connect.Code {
	GinkgoHelper()
	ctx, cancel := context.WithCancel(GinkgoT().Context())
	defer cancel()
	msg := dynamicpb.NewMessage(method.Input())
	set := func(to *dynamicpb.Message, name string, v any) {
		to.Set(to.Descriptor().Fields().ByName(protoreflect.Name(name)), protoreflect.ValueOf(v))
	}
	if f := method.Input().Fields().ByName("call"); f != nil {
		c := dynamicpb.NewMessage(f.Message())
		requester := dynamicpb.NewMessage(f.Message().Fields().ByName("requester").Message())
		set(requester, "service", id.Service)
		set(requester, "region", "us")
		set(c, "requester", protoreflect.Message(requester))
		msg.Set(f, protoreflect.ValueOfMessage(c))
	}
	if f := method.Input().Fields().ByName("peer"); f != nil {
		p := dynamicpb.NewMessage(f.Message())
		set(p, "service", service)
		set(p, "for_region", "us")
		set(p, "of_region", "eu")
		set(p, "version", "v1")
		set(p, "layout", int32(1))
		set(p, "ring", int32(ring))
		msg.Set(f, protoreflect.ValueOfMessage(p))
		if f := method.Input().Fields().ByName("shards"); f != nil && f.Kind() == protoreflect.MessageKind {
			shards := dynamicpb.NewMessage(f.Message())
			set(shards, "to", int32(ring))
			msg.Set(f, protoreflect.ValueOfMessage(shards))
		}
	}
	procedure := "/" + string(method.Parent().FullName()) + "/" + string(method.Name())
	schema := connect.WithSchema(method)
	client := connect.NewClient[dynamicpb.Message, dynamicpb.Message](w.client(id, "eu"), w.regions["eu"].endpoint+procedure, schema,
		connect.WithResponseInitializer(func(spec connect.Spec, m any) error {
			if m, ok := m.(*dynamicpb.Message); ok {
				*m = *dynamicpb.NewMessage(spec.Schema.(protoreflect.MethodDescriptor).Output())
			}
			return nil
		}))
	req := connect.NewRequest(msg)
	if forwardedBy != "" {
		req.Header().Set(dbcontrollerv1.ForwardedByHeader, forwardedBy)
	}
	var err error
	if method.IsStreamingServer() {
		var stream *connect.ServerStreamForClient[dynamicpb.Message]
		if stream, err = client.CallServerStream(ctx, req); err == nil {
			stream.Receive()
			err = stream.Err()
			cancel()
			_ = stream.Close()
		}
	} else {
		_, err = client.CallUnary(ctx, req)
	}
	if err == nil {
		return 0
	}
	return connect.CodeOf(err)
}
