// Package manifest reads and writes the YAML files in which people declare the objects of
// the catalogue. What can be seen in one object is checked here; whether the objects fit
// together is for [catalog.Compile].
package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// APIVersion stands in every document.
const APIVersion = "entente/v1"

// document is what every object looks like in a file.
type document[S any] struct {
	yamlfile.Pos
	APIVersion string   `yaml:"apiVersion,required"`
	Kind       string   `yaml:"kind,required"`
	Metadata   metadata `yaml:"metadata"`
	Spec       S        `yaml:"spec,required"`
}

type metadata struct {
	yamlfile.Pos
	Name  string `yaml:"name"`
	Owner string `yaml:"owner"`
}

// kind is how one kind of objects stands in a file.
type kind struct {
	name   string
	parse  func(*parser, yamlfile.Node) (*statev1.Object, error)
	format func(*statev1.Object) ([]byte, error)
}

// kinds has a row for each of [catalog.Kinds].
var kinds = []kind{
	row("Relationship", (*parser).relationship, formatRelationship),
	row("Gateway", (*parser).gateway, formatGateway),
	row("Service", (*parser).service, formatService),
	row(importKind, (*parser).imported, formatImport),
	row("Agreement", (*parser).agreement, formatAgreement),
	row("RoleBinding", (*parser).roleBinding, formatRoleBinding),
}

// importKind is the only kind without metadata.name: its spec names it.
const importKind = "Import"

// row makes a kind from what turns its spec into an object and back.
func row[S any](name string, read func(*parser, *document[S], *statev1.Object) error, write func(*statev1.Object) (S, error)) kind {
	parse := func(p *parser, doc yamlfile.Node) (*statev1.Object, error) {
		var d document[S]
		if err := doc.Decode(&d); err != nil {
			return nil, err
		}
		if d.Metadata.Name == "" && name != importKind {
			return nil, d.At("metadata").Errorf("%s has no metadata.name", name)
		}
		object := &statev1.Object{Owner: d.Metadata.Owner}
		if err := read(p, &d, object); err != nil {
			return nil, err
		}
		return object, nil
	}
	format := func(object *statev1.Object) ([]byte, error) {
		spec, err := write(object)
		if err != nil {
			return nil, err
		}
		d := document[S]{APIVersion: APIVersion, Kind: name, Metadata: metadata{Owner: object.GetOwner()}, Spec: spec}
		if name != importKind {
			_, d.Metadata.Name = catalog.KindName(object)
		}
		return yamlfile.Marshal(d)
	}
	return kind{name, parse, format}
}

// find returns the row of a kind; nil: there is none.
func find(name string) *kind {
	for i := range kinds {
		if kinds[i].name == name {
			return &kinds[i]
		}
	}
	return nil
}

// Parse reads the documents of a file of any of [catalog.Kinds], in their order, with
// Source set to FILE:LINE. readFile reads the files that they refer to, whose names
// are taken relative to the file's own folder; nil: such a reference is an error.
//
// Only what can be seen in one object is checked here; the error is a
// yamlfile.Errors with the exact places. Whether the objects fit together is for
// [catalog.Compile], over those of all files.
func Parse(file string, r io.Reader, readFile func(path string) ([]byte, error)) ([]*statev1.Object, error) {
	p := parser{file, readFile}
	var objects []*statev1.Object
	err := yamlfile.DecodeAll(file, r, func(doc yamlfile.Node) error {
		object, err := p.object(doc)
		if err != nil {
			return err
		}
		object.Source = doc.Pos().String()
		objects = append(objects, object)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return objects, nil
}

type parser struct {
	file     string
	readFile func(string) ([]byte, error)
}

func (p *parser) object(doc yamlfile.Node) (*statev1.Object, error) {
	if version, pos, ok := doc.Scalar("apiVersion"); ok && version != APIVersion {
		return nil, pos.Errorf("apiVersion is %q; this release reads %q", version, APIVersion)
	}
	kind, pos, ok := doc.Scalar("kind")
	if !ok {
		return nil, doc.Pos().Errorf("the document has no kind; it is one of %s", strings.Join(catalog.Kinds(), ", "))
	}
	k := find(kind)
	if k == nil {
		return nil, pos.Errorf("kind: %v", notOneOf(kind, catalog.Kinds()))
	}
	return k.parse(p, doc.Named(kind))
}

// Format writes objects as the documents that Parse reads back: the same
// objects, save for Source and Revision. It fails for an object that no file can
// say, such as one of a kind this release does not know.
func Format(objects ...*statev1.Object) ([]byte, error) {
	var b bytes.Buffer
	for i, object := range objects {
		name, _ := catalog.KindName(object)
		k := find(name)
		if k == nil {
			return nil, errors.New("write an object as YAML: it is of no kind that this release knows")
		}
		doc, err := k.format(object)
		if err != nil {
			return nil, fmt.Errorf("write %s as YAML: %w", catalog.Key(object), err)
		}
		if i > 0 {
			b.WriteString("---\n")
		}
		b.Write(doc)
	}
	return b.Bytes(), nil
}
