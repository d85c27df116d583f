// Predict the labels of an image by an exported segmentation model in OpenVINO.
//
//   segment_openvino FOLDER IMAGE LABELS.png
//
// FOLDER is from `ppvision export`, with a fixed size (--input_shape 1 3 H W), or as ONNX of any size.
#include <iostream>
#include <openvino/openvino.hpp>

#include "picture.hpp"

static void run(const std::string& folder, const std::string& file, const std::string& target) {
  const YAML::Node manifest = YAML::LoadFile(folder + "/deploy.yaml");
  if (manifest["task"].as<std::string>() != "segmentation" ||
      manifest["output_op"].as<std::string>() != "argmax")
    throw std::runtime_error(folder + ": expected a segmentation model that gives classes");
  const cv::Mat picture = read_picture(file);
  const cv::Mat x = transform(picture.clone(), manifest["transforms"]);

  // OpenVINO reads Paddle's earlier format, which is next to model.json, or ONNX.
  std::string program = manifest["program"].as<std::string>();
  if (manifest["format"].as<std::string>() == "paddle")
    program.replace(program.rfind('.'), std::string::npos, ".pdmodel");
  ov::Core core;
  // By default OpenVINO computes in bfloat16 if the processor has it, which changes labels.
  ov::CompiledModel model = core.compile_model(folder + "/" + program, "CPU",
                                               ov::hint::inference_precision(ov::element::f32));
  ov::InferRequest request = model.create_infer_request();
  ov::Tensor input(ov::element::f32, {1, 3, size_t(x.rows), size_t(x.cols)});
  write_planes(x, input.data<float>());
  request.set_input_tensor(input);
  request.infer();

  ov::Tensor output = request.get_output_tensor();  // [1, H', W'], int32
  const ov::Shape shape = output.get_shape();
  write_labels(output.data<int>(), {int(shape.at(2)), int(shape.at(1))}, picture.size(), target);
}

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: segment_openvino FOLDER IMAGE LABELS.png\n";
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
