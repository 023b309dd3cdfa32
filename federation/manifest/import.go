package manifest

import (
	"errors"
	"math"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

type importSpec struct {
	yamlfile.Pos
	Service  string   `yaml:"service,required"`
	Port     uint16   `yaml:"port,min=1"` // the one that it has in its own domain
	Protocol protocol `yaml:"protocol"`
}

func (p *parser) imported(d *document[importSpec], object *statev1.Object) error {
	if d.Metadata.Name != "" && d.Metadata.Name != d.Spec.Service {
		return d.Metadata.At("name").Errorf("an Import is named by its service; leave metadata.name out")
	}
	object.Kind = &statev1.Object_Import{Import: &statev1.Import{
		Service: d.Spec.Service, Port: uint32(d.Spec.Port), Protocol: statev1.Protocol(d.Spec.Protocol),
	}}
	return nil
}

func formatImport(o *statev1.Object) (importSpec, error) {
	i := o.GetImport()
	if i.GetPort() > math.MaxUint16 {
		return importSpec{}, errors.New("its port is over 65535")
	}
	return importSpec{Service: i.GetService(), Port: uint16(i.GetPort()), Protocol: protocol(i.GetProtocol())}, nil
}
