package catalog_test

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	. "github.com/entente-mesh/entente/federation/catalog"
)

// Whatever changes, Update gives what Compile gives of everything, tables and errors
// alike.
func TestUpdateIsCompile(t *testing.T) {
	short := 0
	rapid.Check(t, func(t *rapid.T) {
		pick := func(what string, of ...string) string { return rapid.SampledFrom(of).Draw(t, what) }
		some := func(what string, of ...string) []string {
			return slices.DeleteFunc(slices.Clone(of), func(string) bool { return !rapid.Bool().Draw(t, what) })
		}
		object := func() *statev1.Object {
			o := &statev1.Object{Source: "f.yaml:" + pick("line", "1", "2", "3"), Revision: rapid.Uint64Range(1, 99).Draw(t, "revision")}
			name := pick("name", "a", "b", "c", "d", "e")
			switch rapid.IntRange(0, 11).Draw(t, "kind") {
			default:
				s := &statev1.Service{Name: name, Path: "/" + name, Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1"}, Port: 80}
				if rapid.IntRange(0, 9).Draw(t, "other path") == 0 {
					s.Path = "/" + pick("path", "a", "b", "z")
				}
				if rapid.IntRange(0, 3).Draw(t, "exports") == 0 {
					s.ExportTo = some("export", "p.example", "q.example")
				}
				if rapid.IntRange(0, 3).Draw(t, "calls something") == 0 {
					s.Calls = some("calls", "a", "b", "x.p.example")
				}
				if rapid.IntRange(0, 3).Draw(t, "listens") == 0 {
					s.OutboundPort, s.Hosts = uint32(rapid.IntRange(1, 3).Draw(t, "outbound")), []string{pick("host", "h1", "h2")}
				}
				if rapid.IntRange(0, 5).Draw(t, "fails over") == 0 {
					s.Failover = &statev1.Failover{Order: []string{pick("order", "dc1", "dc9")}}
				}
				switch rapid.IntRange(0, 3).Draw(t, "speaks") {
				case 0:
					s.Protocol = statev1.Protocol_PROTOCOL_TCP
				case 1:
					s.Http = &statev1.ServiceHTTP{AnyContent: rapid.Bool().Draw(t, "any content"), ReadsBodies: rapid.Bool().Draw(t, "reads bodies")}
				}
				o.Kind = &statev1.Object_Service{Service: s}
			case 0:
				o.Kind = &statev1.Object_Gateway{Gateway: &statev1.Gateway{Name: name, Datacenter: pick("dc", "dc1", "dc2"), Address: name + ".net:1", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1"}}}
			case 1:
				o.Kind = &statev1.Object_Relationship{Relationship: &statev1.Relationship{TrustDomain: pick("peer", "p.example", "q.example"), EndpointUrls: []string{"https://10.0.0.1/"}}}
			case 2:
				i := &statev1.Import{Service: "x.p.example", Port: uint32(rapid.IntRange(0, 1).Draw(t, "port"))}
				i.Protocol = statev1.Protocol(i.Port)
				o.Kind = &statev1.Object_Import{Import: i}
			case 3:
				a := &statev1.Agreement{Name: name, Peer: "p.example", Expires: 1 << 33, Gateways: []*statev1.PeerGateway{{Path: "/g", Datacenter: "dc1", Address: "10.0.0.1:1"}}}
				a.Allow = []*statev1.Allow{{Callers: []string{pick("callers", "a", "b", "**")}, Service: pick("allowed", "a", "b", "x.p.example")}}
				if rapid.Bool().Draw(t, "http") {
					a.Allow[0].Http = []*statev1.HTTPMatch{{Methods: []string{"GET"}}}
				}
				o.Kind = &statev1.Object_Agreement{Agreement: a}
			}
			return o
		}
		now := map[string]*statev1.Object{}
		tables, err := Compile(banking, nil)
		if err != nil {
			t.Fatal(err)
		}
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			changed := map[string]*statev1.Object{}
			for range rapid.IntRange(1, 3).Draw(t, "changes") {
				o := object()
				if _, is := now[Key(o)]; is && rapid.IntRange(0, 3).Draw(t, "delete") == 0 {
					changed[Key(o)] = nil
				} else {
					changed[Key(o)] = o
				}
			}
			after := maps.Clone(now)
			maps.Copy(after, changed)
			maps.DeleteFunc(after, func(_ string, o *statev1.Object) bool { return o == nil })
			whole := false
			all := func() []*statev1.Object {
				whole = true
				return slices.Collect(maps.Values(after))
			}
			before := fmt.Sprintf("%+v", tables.Services())
			got, gotErr := tables.Update(changed, all)
			if !whole {
				short++
			}
			want, wantErr := Compile(banking, all())
			if fmt.Sprint(gotErr) != fmt.Sprint(wantErr) {
				t.Fatalf("%v, compiled as a whole: %v", gotErr, wantErr)
			}
			if fmt.Sprintf("%+v", tables.Services()) != before {
				t.Fatal("the tables before changed")
			}
			if wantErr != nil {
				continue
			}
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("%+v\ncompiled as a whole: %+v", got, want)
			}
			now, tables = after, got
		}
	})
	if short < 10 { // rapid makes fewer with -short
		t.Errorf("only %d changes were not compiled as a whole", short)
	}
}

// BenchmarkUpdate changes one service of ten thousand.
func BenchmarkUpdate(b *testing.B) {
	var objects []*statev1.Object
	for i := range 10_000 {
		name := fmt.Sprintf("s%d", i)
		objects = append(objects, &statev1.Object{Kind: &statev1.Object_Service{Service: &statev1.Service{
			Name: name, Path: "/" + name, Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1000", "unix:path:/opt/" + strings.Repeat("x", 20)}, Port: 80,
		}}})
	}
	tables, err := Compile(banking, objects)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := tables.Update(map[string]*statev1.Object{Key(objects[7]): objects[7]}, nil); err != nil {
			b.Fatal(err)
		}
	}
}
